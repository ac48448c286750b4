"""Plans: costs against XLA's own count of the same program without loops, shapes against real parameters, bad input."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from attnlab import cli
from attnlab.models.attention import AttentionConfig
from attnlab.models.pretrained import load_config
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.planning import plan, unfitting_table
from attnlab.planning.cost import program_cost

ATTENTION = AttentionConfig(4, 4, 2, causal=True, output_dim=8)
BLOCKS = TransformerConfig(ATTENTION, 3, 16, scan=True, remat="elementwise")
MODEL = LanguageModelConfig(BLOCKS, 24, 16, 8, factored=True, dtype="float32")
SIZES = {"sequences": 2, "length": 8, "probes": 2, "steps": 3}
SETTINGS = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 24,
    "max_position_embeddings": 16,
}


def test_loops_count_as_often_as_they_run():
    matrix = jnp.ones((12, 16, 16), jnp.float32)

    def chain(unroll, matrix, start):
        return jax.lax.scan(lambda x, m: (jnp.tanh(x @ m), jnp.sum(x)), start, matrix, unroll=unroll)[0]

    compiled = [
        jax.jit(chain, static_argnums=0).lower(unroll, matrix, jnp.ones((8, 16), jnp.float32)).compile()
        for unroll in (1, 12)
    ]
    loop, flat = (program_cost(each.as_text()) for each in compiled)
    assert loop.flops == flat.flops == 12 * 2 * 8 * 16 * 16
    by_xla = compiled[1].cost_analysis()
    assert flat.traffic == pytest.approx(by_xla["bytes accessed"], rel=0.1)
    assert loop.traffic == pytest.approx(flat.traffic, rel=0.5)  # the loop reads its number and writes its state
    assert loop.received == 0
    with pytest.raises(ValueError, match="expected a compiled program"):
        program_cost("nothing")


@pytest.mark.slow  # six programs, and a process of its own
def test_what_to_change():
    found = plan(MODEL, product="ggn", memory=1.0, **SIZES)
    assert not found.fits
    assert set(found.changes) == {
        "remat='block'",
        "nothing saved (budget=0)",
        "bfloat16",
        "half the sequences",
        "twice the devices",
    }
    assert found.changes["nothing saved (budget=0)"].found.saved == 0
    halved = found.changes["half the sequences"].found
    assert halved.flops == pytest.approx(found.found.flops / 2, rel=0.05)
    spread = found.changes["twice the devices"].found  # compiled in a process of its own
    assert spread.parameters == pytest.approx(found.found.parameters / 2, rel=0.1)
    assert spread.received > 0
    assert unfitting_table(found).row_count == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"product": "fisher"}, "no product 'fisher'"),
        ({"devices": 3}, "multiple of devices, which is 3"),
        ({"length": 17}, "at most 16"),
        ({"steps": 0}, "steps is 0"),
        ({"memory": float("nan")}, "memory is nan"),
        ({"dtype": "int8"}, "dtype is int8"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        plan(MODEL, **SIZES | change)


def test_the_command_needs_no_weights(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    config = replace(load_config(tmp_path), dtype="float64")
    params = LanguageModel(config).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    options = {"product": "ggn", "dtype": "float64", "probes": 1, "steps": 2}
    found = plan(tmp_path, sequences=1, length=4, **options)
    assert found.found.dimension == count
    assert found.found.parameters == 8 * count + 2 * 4 * 4  # tokens and targets
    assert found.found.peak >= found.found.parameters + 3 * 8 * count  # of a recurrence
    assert found.fits
    flags = [flag for name, value in options.items() for flag in (f"--{name}", str(value))]
    cli.main(["plan", str(tmp_path), "--tokens", "1x4", *flags])  # the same programs
    shown = capsys.readouterr().out
    assert "of each device" in shown
    assert "compiled for cpu" in shown


def test_errors_of_the_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    for arguments, message in (
        ([str(tmp_path / "none")], "does not exist"),
        ([str(tmp_path), "--tokens", "4"], "expected sequences x length"),
        ([str(tmp_path), "--rates", "0", "1", "1"], "flops is 0"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["plan", *arguments, "--dtype", "float64"])
        assert message in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(TypeError, match="expected a LanguageModelConfig or a path"):
        plan(7, sequences=1, length=4)
