"""What the curvature of Llama's shapes would take on 1 to 256 devices, from shapes alone.

    python benchmarks/llama_plans.py [--sizes 1B 7B 70B] [--devices 1 8 64 256] [--tokens 256x512] [--product ggn]

Each row compiles the real programs (a density of 10 x 64 products) for so many simulated devices of a CPU, over which
data and float32 parameters are spread; it takes a minute or two, and no weights are made. Times suppose 4e14 operations
a second, 3e12 bytes of memory, and 1e11 bytes from other devices.
"""

import argparse
from dataclasses import replace

from rich.console import Console

from attnlab.models.pretrained.llama import llama_config
from attnlab.planning import Plan, Rates, plan, plans_table

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
SHAPES["1B"] |= {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}
SHAPES["7B"] |= {"num_key_value_heads": 32, "vocab_size": 32000}
SHAPES["70B"] |= {"num_key_value_heads": 8, "vocab_size": 32000}
SAME = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
RATES = Rates(4e14, 3e12, 1e11)


def plan_of(size: str, devices: int, tokens: str, product: str) -> Plan:
    """The plan of one row; blocks are scanned and computed again, logits factored."""
    config = llama_config({**SHAPES[size], **SAME})
    config = replace(config, factored=True, transformer=replace(config.transformer, scan=True, remat="block"))
    sequences, length = map(int, tokens.split("x"))
    options = {"dtype": "float32", "product": product, "devices": devices}
    return plan(config, sequences=sequences, length=length, **options)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--tokens", default="256x512", help="sequences x length (%(default)s)")
    parser.add_argument("--product", default="ggn", help="ggn, hessian or functional (%(default)s)")
    options = parser.parse_args()
    console = Console(width=100)
    for size in options.sizes:
        console.print(size)
        for devices in options.devices:
            console.print(plans_table([plan_of(size, devices, options.tokens, options.product)], RATES))


if __name__ == "__main__":
    main()
