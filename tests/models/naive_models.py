"""The models' equations once more, as plain loops in numpy over one sequence."""

import cmath
import math

import numpy as np


def attention(params, tokens, config, mask=None):
    """One sequence (L, D) through the layer of `config`; the mask is (L, L)."""
    params = {name: np.asarray(value) for name, value in params.items()}
    tokens, length = np.asarray(tokens), len(tokens)
    outputs = [[] for _ in range(length)]
    for head in range(config.heads):
        for i in range(length):
            scores = [score(params, tokens, config, head, i, j) for j in range(length)]
            seen = [(not config.causal or j <= i) and (mask is None or bool(mask[i, j])) for j in range(length)]
            weights = attention_weights(config.weights, scores, seen)
            values = [
                columns(params, "value", shared(config, head), config.value_dim, tokens[j]) for j in range(length)
            ]
            outputs[i].append(sum(w * v for w, v in zip(weights, values, strict=True)))
    merged = np.array([np.concatenate(parts) for parts in outputs])
    if config.output_dim is None:
        return merged
    return merged @ params["output"] + params.get("output_bias", 0)


def attention_weights(kind, scores, seen):
    """The weights of one query on every token, by the definition of each kind."""
    if kind in ("softmax", "softmax_sink"):
        powers = [math.exp(s) if see else 0.0 for s, see in zip(scores, seen, strict=True)]
        return [p / (sum(powers) + (kind == "softmax_sink")) for p in powers]
    act = {"linear": lambda s: s, "sigmoid": lambda s: 1 / (1 + len(scores) * math.exp(-s))}[kind]
    return [act(s) if see else 0.0 for s, see in zip(scores, seen, strict=True)]


def shared(config, head):
    """The key and value head that a query head looks at."""
    return head // (config.heads // (config.key_value_heads or config.heads))


def turned(vector, position, rotary):
    """The first entries of a head, in pairs that are complex numbers, times powers of one another."""
    if rotary is None:
        return vector
    width = round(rotary.share * len(vector))
    pairs = [(2 * i, 2 * i + 1) if rotary.pairs == "neighbours" else (i, i + width // 2) for i in range(width // 2)]
    result = np.array(vector)
    for i, (real, imaginary) in enumerate(pairs):
        number = complex(vector[real], vector[imaginary]) * cmath.exp(1j * position * rotary.base ** (-2 * i / width))
        result[real], result[imaginary] = number.real, number.imag
    return result


def columns(params, name, head, width, token):
    """The part of token @ W + b that belongs to one head."""
    own = slice(head * width, (head + 1) * width)
    bias = params.get(f"{name}_bias")
    return token @ params[name][:, own] + (0 if bias is None else bias[own])


def score(params, tokens, config, head, i, j):
    scale = 1 / math.sqrt(config.key_dim) if config.scale is None else config.scale
    if config.merged:
        return scale * columns(params, "query_key", head, tokens.shape[1], tokens[i]) @ tokens[j]
    query = columns(params, "query", head, config.key_dim, tokens[i])
    key = columns(params, "key", shared(config, head), config.key_dim, tokens[j])
    return scale * turned(query, i, config.rotary) @ turned(key, j, config.rotary)


def layer_norm(token, params, epsilon):
    token = np.asarray(token)
    variance = sum((x - token.mean()) ** 2 for x in token) / len(token)
    return (token - token.mean()) / math.sqrt(variance + epsilon) * params["scale"] + params["bias"]


def rms_norm(token, params, epsilon):
    token = np.asarray(token)
    return token / math.sqrt(sum(x * x for x in token) / len(token) + epsilon) * params["scale"]


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "identity": lambda x: x,
}


def feed_forward(params, token, activation, kind="plain"):
    if kind == "gated":
        gate = np.vectorize(ACTIVATIONS[activation])(token @ params["gate"] + params.get("gate_bias", 0))
        hidden = gate * (token @ params["up"] + params.get("up_bias", 0))
        return hidden @ params["down"] + params.get("down_bias", 0)
    hidden = np.vectorize(ACTIVATIONS[activation])(token @ params["up"] + params.get("up_bias", 0))
    return hidden @ params["down"] + params.get("down_bias", 0)


def transformer(params, tokens, config):
    """One sequence through the stack of `config`."""
    tokens = np.asarray(tokens)
    for index in range(config.layers):
        layer, before = params[f"layer_{index}"], tokens
        tokens = sublayer(layer, "attention", tokens, config, lambda x, p: attention(p, x, config.attention))
        mlp = lambda x, p: feed_forward(p, x, config.activation, config.mlp)  # noqa: E731
        if config.parallel:
            tokens = tokens + mlp(normalize(before, layer["mlp_norm"], config), layer["mlp"])
        elif config.mlp_width is not None:
            tokens = sublayer(layer, "mlp", tokens, config, mlp)
    return normalize(tokens, params["final_norm"], config) if config.final_norm else tokens


def sublayer(layer, name, tokens, config, function):
    norm = layer.get(f"{name}_norm")
    seen = normalize(tokens, norm, config) if config.norm == "pre" else tokens
    updated = function(seen, layer[name]) + (tokens if config.residual else 0)
    return normalize(updated, norm, config) if config.norm == "post" else updated


def normalize(tokens, params, config):
    norm = {"layer_norm": layer_norm, "rms_norm": rms_norm}[config.normalization]
    return np.array([norm(token, params, config.epsilon) for token in tokens])


def language_model(params, symbols, config):
    embedded = np.array([params["token_embedding"][s] for s in symbols])
    if config.positions == "learned":
        embedded = embedded + params["position_embedding"][: len(symbols)]
    unembedding = params["token_embedding"].T if config.tied else params["unembedding"]
    return transformer(params["transformer"], embedded, config.transformer) @ unembedding


def mlp(params, token, config):
    hidden = np.asarray(token)
    for index in range(len(config.widths)):
        hidden = hidden @ params[f"layer_{index}"] + params.get(f"layer_{index}_bias", 0)
        if index + 1 < len(config.widths):
            hidden = np.vectorize(ACTIVATIONS[config.activation])(hidden)
    return hidden


def convnet(params, image, config):
    hidden, reach = np.asarray(image), (config.kernel - 1) // 2
    for index in range(len(config.channels)):
        kernel, height, width = params[f"conv_{index}"], *hidden.shape[:2]
        convolved = np.zeros((height, width, kernel.shape[-1])) + params.get(f"conv_{index}_bias", 0)
        for y, x, i, j in np.ndindex(height, width, config.kernel, config.kernel):
            row, column = y + i - reach, x + j - reach
            if 0 <= row < height and 0 <= column < width:
                convolved[y, x] += hidden[row, column] @ kernel[i, j]
        hidden = np.vectorize(ACTIVATIONS[config.activation])(convolved)
    return hidden.mean(axis=(0, 1)) @ params["output"] + params.get("output_bias", 0)
