"""Claims that attention with constructed weights runs an algorithm on every prompt.

Source, unless said otherwise: von Oswald et al., "Transformers learn in-context by gradient descent" (arXiv
2212.07677). Attention is measured; the algorithm is autodiff on the prompt's own loss, or its residual per eigenvalue.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, equal
from attnlab.icl.constructions import (
    centred_linear_predict,
    exponential_stack_predict,
    functional_gradient_descent,
    gradient_descent_residual,
    gradient_descent_stack,
    gradient_step_layer,
    gradient_step_predict,
    nadaraya_watson,
    nadaraya_watson_attention,
    newton_layers,
    newton_predict,
    newton_residual,
    plus_plus_residual,
    plus_plus_stack,
    softmax_pair_predict,
)
from attnlab.icl.learned_features import feature_attention_predict, init_feature_attention
from attnlab.icl.models import stack_predict
from attnlab.icl.tasks import Prompt, isotropic, sample_prompts, sine_prompts
from attnlab.models.adapters import from_linen
from attnlab.models.networks import MLP, MLPConfig
from attnlab.types import PRNGKey

DIMENSION, LENGTH = 4, 9
IDENTITY = "an identity in float64, to rounding"


def one_prompt(key: PRNGKey) -> Prompt:
    """One noisy prompt of linear regression."""
    return jax.tree.map(lambda x: x[0], sample_prompts(key, isotropic(DIMENSION, 0.2), LENGTH, 1))


def eigenvector_prompts(prompt: Prompt) -> tuple[Float[Array, " d"], Prompt]:
    """The eigenvalues of G = (1/N) sum x x^T, and noise-free prompts whose task and query are its eigenvectors, so that
    the error of an algorithm on prompt i is its residual at eigenvalue i."""
    values, vectors = jnp.linalg.eigh(prompt.inputs.T @ prompt.inputs / LENGTH)
    inputs = jnp.broadcast_to(prompt.inputs, (DIMENSION, LENGTH, DIMENSION))
    return values, Prompt(inputs, vectors.T @ prompt.inputs.T, vectors.T, jnp.ones(DIMENSION))


@claim(
    statement=r"W_K = W_Q = \mathrm{diag}(I, 0),\ W_V = \begin{pmatrix}0 & 0\\ W_0 & -I\end{pmatrix},\ P = \tfrac{\eta}{N} I:"
    r" \quad -\hat y_q = (W_0 - \eta \nabla L(W_0)) x_q",
    source="von Oswald et al., arXiv 2212.07677, proposition 1",
    tolerance=1e-12,
    because=IDENTITY + "; the gradient by autodiff",
    slow=True,
)
def one_layer_is_a_gradient_step(key: PRNGKey) -> Expectation:
    """One linear layer with three outputs against one step from W_0 on the prompt's least-squares loss."""
    keys = jax.random.split(key, 4)
    initial, labels = jax.random.normal(keys[0], (3, DIMENSION)), jax.random.normal(keys[1], (LENGTH, 3))
    inputs, query = jax.random.normal(keys[2], (LENGTH, DIMENSION)), jax.random.normal(keys[3], (DIMENSION,))

    def loss(weights: Array) -> Array:
        return jnp.sum((inputs @ weights.T - labels) ** 2) / (2 * LENGTH)

    predicted = (initial - 0.3 * jax.grad(loss)(initial)) @ query
    layer, start = gradient_step_layer(0.3, initial)
    return equal(
        "three outputs of the layer",
        gradient_step_predict(layer, start, inputs, labels, query),
        predicted,
        unit="relative",
    )


@claim(
    statement=r"\text{an MLP } m \text{ before the layer, tokens } (m(x_i), y_i), (m(x_q), -W_0 m(x_q)): \quad"
    r" \hat y_q = (W_0 - \eta \nabla L(W_0))\, m(x_q),\quad L(W) = \tfrac1{2N} \sum_i \|W m(x_i) - y_i\|^2",
    source="von Oswald et al., arXiv 2212.07677, of whose experiment on sine tasks this is the model",
    tolerance=1e-12,
    because=IDENTITY + "; the gradient by autodiff",
    slow=True,
)
def attention_after_an_mlp_is_a_gradient_step_in_its_features(key: PRNGKey) -> Expectation:
    """A random MLP of two layers before the constructed layer, on one sine task."""
    network = MLPConfig((6, 5), activation="tanh", bias=True)
    start_key, initial_key, prompt_key = jax.random.split(key, 3)
    prompt = jax.tree.map(lambda x: x[0], sine_prompts(prompt_key, LENGTH, 1))
    params = init_feature_attention(start_key, network, 1, scale=0.3, spread=5.0)
    layer, initial = gradient_step_layer(0.3, jax.random.normal(initial_key, (1, 5)))
    params = {**params, "initial": initial, "layer": layer}
    features, query = (from_linen(MLP(network))(params["features"], x) for x in (prompt.inputs, prompt.query))

    def loss(weights: Array) -> Array:
        return jnp.sum((features @ weights - prompt.labels) ** 2) / (2 * LENGTH)

    predicted = (initial[0] - 0.3 * jax.grad(loss)(initial[0])) @ query
    return equal(
        "output of the layer", feature_attention_predict(params, prompt, config=network), predicted, unit="relative"
    )


@claim(
    statement=r"y_q - \hat y_q = x_q^\top R\, w,\quad R = \prod_k (I - M_k^\top A_k M_k \hat G),\quad"
    r" M_{k+1} = (I - B_k \hat G_k A_k^\top) M_k;\quad \text{for scalars } r \to r (1 - a_k \lambda),\ \lambda \to \lambda (1 - b_k \lambda)^2",
    source="Ahn et al., arXiv 2306.00297; the scalar case is GD++ of von Oswald et al., arXiv 2212.07677; matrices derived here",
    tolerance=1e-12,
    because=IDENTITY + " of three layers",
    slow=True,
)
def layers_that_transform_the_inputs_are_gd_plus_plus(key: PRNGKey) -> Expectation:
    """Three linear layers: matrices A_k, B_k on a random task, and scalars a_k, b_k per eigenvalue."""
    prompt_key, task_key, matrix_key, scalar_key = jax.random.split(key, 4)
    noisy = one_prompt(prompt_key)
    task = jax.random.normal(task_key, (DIMENSION,))
    prompt = Prompt(noisy.inputs, noisy.inputs @ task, noisy.query, noisy.query @ task)
    A, B = 0.3 * jax.random.normal(matrix_key, (2, 3, DIMENSION, DIMENSION))
    residual = plus_plus_residual(A, B, prompt.inputs.T @ prompt.inputs / LENGTH)
    left = prompt.target - stack_predict(plus_plus_stack(A, B), prompt)

    values, prompts = eigenvector_prompts(prompt)
    a, b = jax.random.uniform(scalar_key, (2, 3), minval=0.1, maxval=0.5)
    # one head has one matrix of scores, a_k I: the contraction b_k is what it writes, b_k / a_k, times that
    scalars = plus_plus_stack(*(x[:, None, None] * jnp.eye(DIMENSION)[None] for x in (a, b / a)))
    errors = prompts.target - jax.vmap(lambda prompt: stack_predict(scalars, prompt))(prompts)
    recursion = jnp.ones(DIMENSION)
    for step, contraction in zip(a, b, strict=True):
        recursion, values = recursion * (1 - step * values), values * (1 - contraction * values) ** 2
    predicted = jnp.append(recursion, prompt.query @ residual @ task)
    return equal("residuals by eigenvalue, and with matrices", jnp.append(errors, left), predicted, unit="relative")


@claim(
    statement=r"y_q - \hat y_q = (1 - \alpha \lambda^2)^{2^k} \text{ after } k \text{ Newton layers},"
    r" \quad (1 - \eta \lambda)^k \text{ after } k \text{ gradient layers}",
    source="Fu et al., arXiv 2310.17086, for Newton's iteration; linear attention alone suffices: derived here",
    tolerance=1e-12,
    because=IDENTITY + ", on prompts whose task and query are an eigenvector of the empirical covariance",
    slow=True,
)
def residuals_of_newton_and_gradient_layers(key: PRNGKey) -> Expectation:
    """Attention stacks for three steps of either algorithm, at every eigenvalue of one prompt."""
    values, prompts = eigenvector_prompts(one_prompt(key))
    scale, step = 1 / values[-1] ** 2, 1 / values[-1]
    newton = newton_layers(DIMENSION, 3, scale)
    descent = gradient_descent_stack(jnp.broadcast_to(step * jnp.eye(DIMENSION), (3, DIMENSION, DIMENSION)))
    left = [
        prompts.target - jax.vmap(predict)(prompts)
        for predict in (lambda p: newton_predict(newton, p), lambda p: stack_predict(descent, p))
    ]
    predicted = [newton_residual(values, 3, scale), gradient_descent_residual(values, 3, step)]
    return equal(
        "residuals by eigenvalue: Newton, gradient descent", jnp.stack(left), jnp.stack(predicted), unit="relative"
    )


@claim(
    statement=r"\|x_i\| = \|x_q\| = 1: \quad \sum_i \mathrm{softmax}(x_q^\top x_i / h^2)\, y_i"
    r" = \frac{\sum_i e^{-\|x_q - x_i\|^2 / 2 h^2} y_i}{\sum_i e^{-\|x_q - x_i\|^2 / 2 h^2}}",
    source="the norms of the inputs cancel in the softmax; derived here",
    tolerance=1e-12,
    because=IDENTITY,
    slow=True,
)
def softmax_attention_on_the_sphere_is_nadaraya_watson(key: PRNGKey) -> Expectation:
    """Softmax attention over unit inputs against kernel regression from distances."""
    prompt = one_prompt(key)
    inputs = prompt.inputs / jnp.linalg.norm(prompt.inputs, axis=1, keepdims=True)
    on_sphere = Prompt(inputs, prompt.labels, prompt.query / jnp.linalg.norm(prompt.query), prompt.target)
    return equal(
        "output of the attention",
        nadaraya_watson_attention(on_sphere, 0.7),
        nadaraya_watson(on_sphere, 0.7),
        unit="relative",
    )


@claim(
    statement=r"y_i \to y_i - \tfrac{\eta_k}{N} \sum_j e^{x_i^\top x_j} y_j \text{ is gradient descent on functions"
    r" in the space of the kernel } e^{x^\top x'}",
    source="Cheng, Chen, Sra, arXiv 2312.06528",
    tolerance=1e-12,
    because=IDENTITY + " of three layers",
)
def exponential_attention_descends_in_function_space(key: PRNGKey) -> Expectation:
    """Three layers of attention with scores exp(<x, x'>) against three functional gradient steps."""
    prompt = one_prompt(key)
    small = Prompt(prompt.inputs / 2, prompt.labels, prompt.query / 2, prompt.target)
    steps = jnp.array([0.3, 0.2, 0.5])
    return equal(
        "output of the three layers",
        exponential_stack_predict(small, steps),
        functional_gradient_descent(small, steps),
        unit="relative",
    )


@claim(
    statement=r"\frac{1}{2s} \left[\mathrm{softmax}(s X x_q) - \mathrm{softmax}(-s X x_q)\right]^\top y"
    r" = \frac1N \sum_i (x_i - \bar x)^\top x_q\, y_i + O(s^2)",
    source="the difference is odd in s, so that its even orders cancel; derived here",
    tolerance=1e-3,
    because="the order, 2, from errors at s = 0.001 and 0.002: the next order, s^4, shifts it by about s^2",
)
def two_softmax_heads_make_one_linear_head(key: PRNGKey) -> Expectation:
    """The order at which the difference of two softmax heads reaches centred linear attention."""
    prompt = one_prompt(key)
    limit = centred_linear_predict(prompt)
    coarse, fine = (jnp.abs(softmax_pair_predict(prompt, scale) - limit) for scale in (2e-3, 1e-3))
    return equal("order of the difference in s", jnp.log2(coarse / fine), 2.0, unit="relative")
