"""The benchmark's models in torch: the equations of `attnlab.models` on the same weights."""

import os

import torch
from torch import nn
from torch.nn import functional as F

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_model(case, arrays):
    def attention(x, weights, heads, causal):
        batch, length, _ = x.shape
        q, k, v = (
            (x @ weights[name]).view(batch, length, heads, -1).transpose(1, 2) for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        mixed = torch.softmax(scores, -1) @ v
        return mixed.transpose(1, 2).reshape(batch, length, -1) @ weights["output"]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name, array in arrays.items():
                if name.startswith("params/"):
                    self.register_parameter(
                        name.removeprefix("params/").replace("/", "__"), nn.Parameter(torch.tensor(array))
                    )

        def below(self, prefix):
            return {
                name.removeprefix(prefix): parameter
                for name, parameter in self.named_parameters()
                if name.startswith(prefix)
            }

        def norm(self, x, prefix):
            weights = self.below(prefix)
            return F.layer_norm(x, x.shape[-1:], weights["scale"], weights["bias"], 1e-6)

        def forward(self, x):
            heads = int(arrays["heads"])
            if case == "attention":
                return attention(x, self.below(""), heads, causal=False)
            x = self.token_embedding[x] + self.position_embedding[: x.shape[1]]
            for layer in range(int(arrays["layers"])):
                prefix = f"transformer__layer_{layer}__"
                normed = self.norm(x, f"{prefix}attention_norm__")
                x = x + attention(normed, self.below(f"{prefix}attention__"), heads, causal=True)
                mlp = self.below(f"{prefix}mlp__")
                hidden = F.gelu(self.norm(x, f"{prefix}mlp_norm__") @ mlp["up"] + mlp["up_bias"])
                x = x + hidden @ mlp["down"] + mlp["down_bias"]
            return (self.norm(x, "transformer__final_norm__") @ self.unembedding).flatten(0, 1)

    torch.set_num_threads(THREADS)
    inputs, targets = torch.tensor(arrays["inputs"]), torch.tensor(arrays["targets"])
    loss = nn.MSELoss() if case == "attention" else nn.CrossEntropyLoss()
    return Model(), loss, inputs.long() if case != "attention" else inputs, targets
