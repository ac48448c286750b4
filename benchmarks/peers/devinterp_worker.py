"""Learning coefficients by devinterp, in an interpreter that has it: `devinterp_worker.py PROBLEM.npz OPTIONS.json`.

Prints a line of JSON: the coefficient of each chain, and the seconds of a short and of a long run after one that
warms up.
"""

import json
import sys
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from devinterp.slt.llc import llc


class Model(torch.nn.Module):
    """logits = output tanh(hidden embedding[token])."""

    def __init__(self, arrays):
        super().__init__()
        for name in ("embedding", "hidden", "output"):
            setattr(self, name, torch.nn.Parameter(torch.tensor(arrays[name])))

    def forward(self, tokens):
        """(sequences, length, vocabulary)."""
        return torch.tanh(self.embedding[tokens] @ self.hidden) @ self.output


def losses(model, tokens):
    """(sequences, length - 1)."""
    logits = model(tokens[:, :-1])
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return flat.reshape(len(tokens), -1)


def run(arrays, options, draws):
    """Chains of so many draws: coefficient of each, seconds."""
    dataset = Dataset.from_dict({"input_ids": arrays["tokens"].tolist()}).with_format("torch")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = llc(
            Model(arrays), dataset, {}, lr=options["step"] ** 2, n_beta=options["scale"], num_chains=options["chains"],
            num_draws=draws, batch_size=options["batch"], localization=options["localization"], loss_fn=losses,
            device="cpu", match_sampling_input_ids_across_chains=False, output_path=f"{folder}/run",
        )  # fmt: skip
    return found.llc_per_chain.values.tolist(), time.perf_counter() - began


def main():
    arrays, options = dict(np.load(sys.argv[1])), json.loads(sys.argv[2])
    torch.set_num_threads(options["threads"])
    run(arrays, options, 20)
    short, long = (run(arrays, options, draws) for draws in options["draws"])
    print(json.dumps({"values": long[0], "seconds": [short[1], long[1]]}))


if __name__ == "__main__":
    main()
