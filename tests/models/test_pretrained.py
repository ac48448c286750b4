"""Pretrained models from files: against another implementation, in every format, and what is wrong with files."""

import json
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from published import SETTINGS, filled, tokens_of
from safetensors.numpy import save_file

from attnlab.losses import cross_entropy
from attnlab.models.pretrained import load, next_tokens, smollm2
from attnlab.models.pretrained.loading import SMOLLM2
from attnlab.models.text_encoder import TokenBatch
from attnlab.objectives import objective
from attnlab.trees import dimension
from compare import assert_close

REFERENCE = json.loads(Path(__file__).with_name("language_references.json").read_text())
FAMILIES = [pytest.param(name, marks=pytest.mark.slow) if name == "gpt_neox_sequential" else name for name in SETTINGS]


def tensors_of(name):
    return {key: filled(key, shape) for key, shape in REFERENCE["tiny"][name]["shapes"].items()}


def write(folder, name, tensors=None, **changes):
    """A folder with the settings and the tensors of a tiny model."""
    (folder / "config.json").write_text(json.dumps(SETTINGS[name] | changes))
    save_file(tensors_of(name) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def outputs(model, name):
    tokens, mask = (jnp.asarray(array) for array in tokens_of(name))
    inputs = TokenBatch(tokens, mask) if name == "bert" else tokens
    return jax.jit(model.predict)(model.params, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_those_of_another_implementation(name, tmp_path):
    """Both in float32. The parameters of the pooler are not ours; BERT's second segment is of no use for one text."""
    model = load(write(tmp_path, name))
    assert_close(outputs(model, name), np.float32(REFERENCE["tiny"][name]["outputs"]), 1e-6)
    unused = {"bert": 8 * 8 + 8 + 2 * 8}.get(name, 0)
    assert dimension(model.params) == sum(tensor.size for tensor in tensors_of(name).values()) - unused
    assert model.formats == f"{len(tensors_of(name))} tensors F32"


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_every_format_holds_the_same_parameters(tmp_path):
    tensors = {
        name: tensor.astype(ml_dtypes.bfloat16).astype(np.float32) for name, tensor in tensors_of("llama").items()
    }
    expected = load(write(tmp_path, "llama", tensors)).params
    assert_same(load(tmp_path / "model.safetensors").params, expected)
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    buffered = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    for same in (wrapped, bare, tied, buffered, half):
        assert_same(load(write(tmp_path, "llama", same)).params, expected)
    assert load(tmp_path).formats == "20 tensors BF16"
    stacked = load(tmp_path, scan=True).params["transformer"]["layers"]["mlp"]["gate"]
    assert_same(stacked[1], expected["transformer"]["layer_1"]["mlp"]["gate"])
    float16 = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    rounded = load(write(tmp_path, "llama", float16), dtype="float64").params
    assert_close(rounded["token_embedding"], tensors["model.embed_tokens.weight"].astype(float), 1e-4)


def write_shards(folder, name):
    (folder / "config.json").write_text(json.dumps(SETTINGS[name]))
    tensors, index = tensors_of(name), {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[number::2])
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_shards_are_read_as_the_index_says(tmp_path):
    (tmp_path / "one").mkdir()
    expected = load(write(tmp_path / "one", "gpt2")).params
    assert_same(load(write_shards(tmp_path, "gpt2")).params, expected)
    second = tmp_path / "model-00002-of-00002.safetensors"
    held = dict(list(tensors_of("gpt2").items())[1::2])
    save_file(held | {"beside": np.zeros(1)}, second)
    with pytest.raises(ValueError, match="holds beside; expected only what"):
        load(tmp_path)
    held.popitem()
    save_file(held, second)
    with pytest.raises(ValueError, match=r"does not hold transformer.ln_f.bias; expected what"):
        load(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected every file that model.safetensors.index.json names"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_maps": {}}')
    with pytest.raises(ValueError, match=r"the settings lack weight_map; .* Did you mean 'weight_maps'"):
        load(tmp_path)


WORDS = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""What a GGUF file calls the tensors of Llama and GPT-2."""


def gguf_name(name):
    stem, _, ending = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", name)
    key = next(key for key in WORDS if stem == key or stem.endswith(f".{key}"))
    return f"{f'blk.{layer[1]}.' if layer else ''}{WORDS[key]}.{ending}"


def as_gguf(name, tensor):
    """As a converter writes it: rows of queries and keys in pairs of neighbours, matrices acting on columns."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads:
        return np.concatenate([head[[0, 2, 1, 3]] for head in np.split(tensor, heads)])  # heads of width 4
    is_matrix = ".c_" in name and name.endswith("weight")
    return np.ascontiguousarray(tensor.T) if is_matrix else tensor


def write_gguf(path, family, **more):
    settings, writer = SETTINGS[family], gguf.GGUFWriter(path, family)
    writer.add_context_length(12)
    writer.add_embedding_length(settings.get("hidden_size", settings.get("n_embd")))
    writer.add_feed_forward_length(settings.get("intermediate_size", settings.get("n_inner")))
    writer.add_block_count(2)
    writer.add_head_count(settings.get("num_attention_heads", settings.get("n_head")))
    if family == "llama":
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(100.0)
    else:
        writer.add_layer_norm_eps(1e-5)
    for name, value in more.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(f"{family}.{name}", value)
    for name, tensor in tensors_of(family).items():
        writer.add_tensor(gguf_name(name), as_gguf(name, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_gguf_file_holds_the_same_parameters(family, tmp_path):
    found = load(write_gguf(tmp_path / "tiny.gguf", family))
    expected = load(write(tmp_path, family))
    assert_same(found.params, expected.params)
    assert_close(found.config.transformer.epsilon, 1e-5, 1e-6)
    assert found.tokenizer is None


def test_bad_gguf_files(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf", "llama")
    cut = tmp_path / "cut.gguf"
    for length in (10, 300, whole.stat().st_size - 100):
        cut.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(ValueError, match="is no whole GGUF file"):
            load(cut)
    with pytest.raises(ValueError, match="scale rotary frequencies by the rule 'yarn'"):
        load(write_gguf(tmp_path / "scaled.gguf", "llama", **{"rope.scaling.type": "yarn"}))
    with pytest.raises(ValueError, match=r"settings rope.scaling.what, which are not implemented for llama"):
        load(write_gguf(tmp_path / "odd.gguf", "llama", **{"rope.scaling.what": "yarn"}))
    with pytest.raises(ValueError, match="rotary_dim = 2; only 4 is implemented"):
        load(write_gguf(tmp_path / "part.gguf", "llama", **{"rope.dimension_count": 2, "attention.key_length": 4}))
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="no architecture of GGUF files that is read 'mamba'; expected one of: llama"):
        load(tmp_path / "other.gguf")


def without(name):
    tensors = tensors_of("llama")
    del tensors[name]
    return tensors


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (without(QUERY), {}, rf"missing: {QUERY[6:]} \(nearest: layers.1"),
        (without(QUERY) | {QUERY.replace("q_", "qq_"): np.ones((2, 2))}, {}, r"q_proj.weight \(nearest: .*qq_proj"),
        (
            tensors_of("llama") | {QUERY: np.ones((16, 3))},
            {},
            r"misshapen: .* \(16, 3\) where the settings say \(16, 16\)",
        ),
        (tensors_of("llama") | {"model.adapter.weight": np.ones(2)}, {}, "left over: adapter.weight"),
        (None, {"num_hidden_layers": 1}, "file holds 2 layers, the settings say 1"),
        (None, {"num_hidden_layers": 3}, "missing: layers.2.* and 3 more.*file holds 2 layers, the settings say 3"),
        (
            tensors_of("llama") | {"norm.weight": np.ones(16)},
            {},
            "'model.norm.weight' and 'norm.weight', which are one",
        ),
        (tensors_of("llama") | {"lm_head.weight": np.ones((19, 16))}, {}, "lm_head.weight is not embed_tokens.weight"),
        (tensors_of("llama") | {"model.norm.weight": np.full(16, np.nan)}, {}, "norm.weight has entries that are not"),
        (tensors_of("llama") | {"model.norm.weight": np.ones(16, int)}, {}, "is stored as I64; expected one of"),
        (None, {"attention_bias": True}, "attention_bias = True; only False is implemented"),
        (None, {"rope_scaling": {"rope_type": "llama3"}}, "by the rule 'llama3'; only 'default' is implemented"),
        (None, {"hidden_act": "mish"}, "no implementation of hidden_act 'mish'"),
        (None, {"hidden_size": None, "hiden_size": 3}, "the settings lack hidden_size.* Did you mean"),
        (
            None,
            {"model_type": "mamba", "architectures": ["Mamba"]},
            r"pretrained models 'mamba \(Mamba\)'; expected one",
        ),
        (None, {"quantization_config": {}}, "quantization_config"),
        (None, {"num_attention_heads": 3}, "a width of 16 and 3 heads; expected a multiple"),
    ],
)
def test_nothing_is_cut_or_left_over(tensors, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, "llama", tensors, **changes))


def test_bad_paths_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="which does not exist; expected a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON .* is it cut short"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected an object"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"config.json'; expected a folder with config.json and safetensors"):
        load(tmp_path / "config.json")
    file = write(tmp_path, "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds config.json; expected model.safetensors, or"):
        load(tmp_path)


@pytest.mark.parametrize("package", ["safetensors", "gguf", "tokenizers"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", "llama") if package == "gguf" else write(tmp_path, "bert")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf'package {package}.*pip install "attnlab\[pretrained\]"'):
        load(path)


def test_bad_options_and_tokens(tmp_path):
    model = load(write(tmp_path, "gpt2"))
    with pytest.raises(ValueError, match="1 <= L <= 12"):
        model.predict(model.params, jnp.zeros((1, 13), int))
    with pytest.raises(ValueError, match=r"tokens range from 0 to 19; expected 0 ... 18"):
        model.predict(model.params, jnp.array([[0, 19]]))
    with pytest.raises(ValueError, match="factored is True, but a text encoder has no logits"):
        load(write(tmp_path, "bert"), factored=True)


@pytest.fixture(scope="module")
def packaged():
    if find_spec(SMOLLM2) is None:  # not to be imported without its dependencies
        pytest.skip("the weights are not installed")
    return smollm2(factored=True)


@pytest.mark.slow
def test_logits_and_loss_of_smollm2_are_those_of_another_implementation(packaged):
    """Both in float32: logits are up to 33."""
    expected = REFERENCE["smollm2"]
    batch = packaged.tokenizer.encode([expected["passage"]], len(expected["tokens"]))
    assert batch.tokens[0].tolist() == expected["tokens"]
    logits = np.asarray(jax.jit(lambda params, x: packaged.predict(params, x).dense())(packaged.params, batch.tokens))[
        0
    ]
    found = logits[list(expected["positions"])][:, list(expected["entries"])]
    assert_close(found, np.float32(expected["logits"]), 1e-5)
    assert np.max(np.abs(found - np.float32(expected["logits"]))) <= 1e-4
    assert_close(np.linalg.norm(logits, axis=-1), np.float32(expected["norms"]), 1e-5)
    _, targets, weights = next_tokens(batch)
    logits = jnp.asarray(logits[None, :-1])
    assert_close(cross_entropy(logits, targets, weights), np.float32(expected["loss"]), 1e-5)
    assert packaged.formats == "210 tensors Q4_1, 61 F32, 1 Q8_0"
    assert dimension(packaged.params) == 134_515_008


@pytest.mark.slow
def test_digits_behind_white_space_are_tokens_of_their_own(packaged):
    """As the rule of this vocabulary says. The reader of GGUF files in `transformers` does not split them there, so
    that the reference has no such text."""
    tokens = packaged.tokenizer.encode(["A\n\t12345 7"], 9).tokens[0].tolist()
    assert [packaged.tokenizer.decode([token]) for token in tokens] == ["A", "\n\t", *"12345", " ", "7"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
def test_settings_that_nobody_reads_are_told(name, tmp_path):
    harmless = {"bos_token_id": 0, "attention_dropout": 0.1, "torch_dtype": "float16", "_name_or_path": "x"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(write(tmp_path, name, **harmless))
    with pytest.warns(UserWarning, match=r"the settings logit_scale = 0\.5, residual_scale = 2 are not known here"):
        load(write(tmp_path, name, residual_scale=2, logit_scale=0.5))


def test_padding_counts_for_nothing(tmp_path):
    model = load(write(tmp_path, "llama"), factored=True)
    tokens, mask = (jnp.asarray(array) for array in tokens_of("llama"))
    inputs, targets, weights = next_tokens(TokenBatch(tokens, mask))
    assert weights.tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    risk = objective(model.predict, cross_entropy, inputs, targets, weights=weights)
    logits = np.asarray(model.predict(model.params, inputs).dense(), float)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    terms = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    assert_close(risk(model.params), np.float32(-(terms[0].sum() + terms[1, :3].sum()) / 9), 1e-6)
    with pytest.raises(ValueError, match="no token in it a next one"):
        next_tokens(TokenBatch(tokens, mask & (tokens < 0)))
