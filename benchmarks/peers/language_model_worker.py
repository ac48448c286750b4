"""One case of `language_model.py` in torch: a JSON request as the argument, a JSON answer on the last line.

The model is that of transformers, of the same GGUF file, with its plain attention, whose backward pass can be
differentiated again.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import time

from language_model import answer, tokens_of


def main(request: dict) -> dict:
    """The answer to one request."""
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(request["weights"])
    options = {"gguf_file": path.name, "dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), **options).eval()
    parameters = list(model.parameters())
    data = torch.tensor(tokens_of(tuple(request["size"])))
    batches, loss = [(data[:, :-1], data[:, 1:].reshape(-1))], torch.nn.CrossEntropyLoss()

    class Flat(torch.nn.Module):
        """Logits of all positions in one axis."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens, use_cache=False).logits.flatten(0, 1)

    flat_model = Flat()
    vector = torch.cat([parameter.detach().flatten() for parameter in parameters])
    started = time.perf_counter()
    product = product_of(request["case"], flat_model, loss, parameters, batches, vector)
    image = product()
    first = time.perf_counter() - started
    along, norm = float(vector @ image), float(image.norm())
    del image
    return answer(product, request["rounds"], first, along, norm)


def product_of(case: str, model, loss, parameters, batches, vector):
    """A function that makes the product anew."""
    import torch

    (tokens, targets) = batches[0]
    if case == "gradient":
        return lambda: torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(tokens), targets), parameters)])
    library, kind = case.split(" ", 1)
    if library == "curvlinops":
        from curvlinops import GGNLinearOperator, HessianLinearOperator

        operator = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}[kind]
        built = operator(model, loss, parameters, batches, check_deterministic=False)
        return lambda: built @ vector
    from hessian_eigenthings import HessianOperator

    method = "autograd" if kind == "hessian" else "finite_difference"
    built = HessianOperator(model, batches, lambda model, batch: loss(model(batch[0]), batch[1]), method=method)
    return lambda: built.matvec(vector)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
