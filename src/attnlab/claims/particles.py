"""Claims about tokens as particles on the sphere: equal angles, energies, clusters, long contexts."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.particles.clusters import count_clusters, interaction_energy, metastable_count
from attnlab.particles.flow import attention_of, equiangular_tokens, token_flow, uniform_tokens, velocity
from attnlab.particles.laws import equiangular_cosine, equiangular_rate, fastest_mode, mode_rates, self_attention_share
from attnlab.types import PRNGKey

PAPER = "Geshkovski, Letrouit, Polyanskiy, Rigollet, arXiv 2312.10794"
TOLERANCE = "both solved to 1e-8 and better a step"


@claim(
    statement=r"\gamma' = \frac{2 e^{\beta\gamma} (1 - \gamma)(1 + (n - 1)\gamma)}{e^\beta + (n - 1) e^{\beta\gamma}}"
    r" \text{ for } n \text{ tokens pairwise at cosine } \gamma,\ V = I",
    source=PAPER,
    tolerance=1e-6,
    because=TOLERANCE,
    slow=True,
)
def equal_angles_stay_equal_and_follow_their_law(key: PRNGKey) -> list[Expectation]:
    """Seven tokens at a random cosine and beta, with normalisation and without; a causal mask breaks the law."""
    cosine_key, beta_key = jax.random.split(key)
    cosine = float(jax.random.uniform(cosine_key, minval=-0.1, maxval=0.5))
    beta = float(jax.random.uniform(beta_key, minval=0.5, maxval=4.0))
    start, times = equiangular_tokens(7, cosine), jnp.linspace(0.0, 2.0, 9)
    found = []
    for name, normalised in (("not normalised", False), ("normalised", True)):
        path = token_flow(start, times, beta, normalised=normalised)
        gram = jnp.einsum("tid,tjd->tij", path, path)[:, *jnp.triu_indices(7, 1)]
        law = equiangular_cosine(cosine, times, 7, beta, normalised=normalised)
        found.append(equal(f"cosines of all pairs in time, {name}", gram, jnp.repeat(law[:, None], gram.shape[1], 1)))
    causal = token_flow(start, times, beta, causal=True)[-1]
    apart = jnp.abs(causal[0] @ causal[1] - law[-1])
    return [*found, at_least("the first two under a causal mask, off by", apart, 0.003)]


@claim(
    statement=r"\frac{d}{dt} \frac{1}{2 \beta n^2} \sum_{ij} e^{\beta \langle x_i, x_j \rangle} = \frac1n \sum_i |\dot x_i|^2,"
    r" \text{ normalised } \frac{1}{n^2} \sum_i Z_i |\dot x_i|^2",
    source=PAPER + ", section 3",
    tolerance=1e-10,
    because="an identity in float64, to rounding",
)
def the_energy_grows_by_the_squared_speed(key: PRNGKey) -> list[Expectation]:
    """Twelve random tokens in four dimensions at beta = 3: both identities, and V = -I, under which it falls."""
    tokens, beta = uniform_tokens(key, 12, 4), 3.0
    energy = lambda x: interaction_energy(x, beta)  # noqa: E731
    masses = jnp.sum(jnp.exp(beta * tokens @ tokens.T), axis=1) / 12
    slopes, squares = [], []
    for normalised, weights in ((False, jnp.ones(12)), (True, masses)):
        speed = velocity(tokens, beta, normalised=normalised)
        slopes.append(float(jax.jvp(energy, (tokens,), (speed,))[1]))
        squares.append(float(weights @ jnp.sum(speed**2, axis=1) / 12))
    away = velocity(tokens, beta, -jnp.eye(4))
    falling = jax.jvp(energy, (tokens,), (away,))[1]
    return [
        equal("slopes of the energy", slopes, squares, unit="relative"),
        equal("slope with V = -I", falling, -squares[1], unit="relative"),
    ]


@claim(
    statement=r"\text{tokens spread evenly on the circle: mode } k \text{ grows at the rate } \frac{k^2 I_k(\beta)}{\beta I_0(\beta)},"
    r"\text{ fastest at } k \approx \sqrt{2 \beta}",
    source="derived here, from the mean field of arXiv 2312.10794",
    because="even tokens integrate the modes exactly but for aliases, of size I_{n-k}(beta)",
)
def the_fastest_mode_is_the_root_of_twice_beta(key: PRNGKey) -> list[Expectation]:
    """The flow's Jacobian at 128 even tokens, applied to displacements of the modes 1 to 16, at a random beta."""
    beta = float(jnp.exp(jax.random.uniform(key, minval=jnp.log(10.0), maxval=jnp.log(60.0))))
    angles = 2 * jnp.pi * jnp.arange(128.0) / 128
    tokens = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    tangents = jnp.stack([-jnp.sin(angles), jnp.cos(angles)], axis=1)

    def rate(mode: Array) -> Array:
        shape = jnp.cos(mode * angles)
        moved = jax.jvp(lambda x: velocity(x, beta), (tokens,), (shape[:, None] * tangents,))[1]
        return jnp.sum(moved * tangents, axis=1) @ shape / (shape @ shape)

    measured = jax.vmap(rate)(jnp.arange(1, 17, dtype=angles.dtype))
    return [
        equal("growth rates of 16 modes", measured, mode_rates(beta, 16), 1e-8, unit="relative"),
        equal("fastest mode over sqrt(2 beta)", fastest_mode(beta) / (2 * beta) ** 0.5, 1.0, 0.12, unit="relative",
              because="a whole number, and the next order in 1 / beta"),
    ]  # fmt: skip


@claim(
    statement=r"\text{from almost every start in } d \ge 3 \text{ all tokens meet, in the end as } 1 - \gamma \sim e^{-2t}",
    source=PAPER + ", theorem 4.1 and section 6",
    because="the rate is read between 1 - g of 1e-3 and 1e-6, where the next order in 1 - g is below 1 %",
    slow=True,
)
def random_tokens_meet_at_rate_two(key: PRNGKey) -> list[Expectation]:
    """Sixteen random tokens in five dimensions at beta = 1, seen at 161 times to t = 40."""
    times = jnp.linspace(0.0, 40.0, 161)
    path = token_flow(uniform_tokens(key, 16, 5), times, 1.0, tolerance=1e-12)
    farthest = np.asarray(1 - jnp.min(jnp.einsum("tid,tjd->tij", path, path), axis=(1, 2)))
    seen = (farthest < 1e-3) & (farthest > 1e-6)
    rate = -np.polyfit(np.asarray(times)[seen], np.log(farthest[seen]), 1)[0]
    return [
        equal("clusters at the end", count_clusters(path[-1]), 1.0, 0.0),
        equal("rate of 1 - cosine of the farthest pair", rate, 2.0, 0.03, unit="relative"),
        at_most("energy that is lost on the way", -jnp.min(jnp.diff(jax.vmap(interaction_energy, (0, None))(path, 1.0))), 1e-12),
    ]  # fmt: skip


@claim(
    statement=r"\beta = c \log n: \text{ attention to oneself tends to } 1 \text{ for } c (1 - \gamma) > 1 \text{ and to } 0 \text{ below;}"
    r" \text{ there it is } \tfrac{n}{2n - 1}",
    source="Rigollet, arXiv 2512.01868, for the transition; the value at it derived here",
    because="exact for equal angles",
    slow=True,
)
def long_contexts_have_a_critical_temperature(key: PRNGKey) -> list[Expectation]:
    """Tokens at equal angles of a random cosine, 32 and 256 of them, at the critical c and 1 to either side of c(1 - g)."""
    cosine = float(jax.random.uniform(key, minval=0.1, maxval=0.7))
    measured, laws, slowing = [], [], []
    for n in (32, 256):
        tokens = equiangular_tokens(n, cosine)
        for excess in (-0.5, 0.0, 0.5):
            beta = (1 + excess) / (1 - cosine) * np.log(n)
            measured.append(float(attention_of(tokens, beta)[0, 0]))
            laws.append(float(self_attention_share(n, (1 + excess) / (1 - cosine), cosine)))
            speed = velocity(tokens, beta)
            slowing.append(float(2 * speed[0] @ tokens[1] / equiangular_rate(jnp.asarray(cosine), n, beta)))
    shares = np.reshape(measured, (2, 3))
    return [
        equal("attention to oneself, by n and c", measured, laws, 1e-10),
        equal("speed of the cosine over its law", slowing, 1.0, 1e-9),
        equal("at the critical c", shares[:, 1], [32 / 63, 256 / 511], 1e-10),
        at_most("below it at 256 over that at 32", shares[1, 0] / shares[0, 0], 0.45),
        at_least("above it at 256 less that at 32", shares[1, 2] - shares[0, 2], 0.05),
    ]


@claim(
    statement=r"\text{random tokens on the circle rest in } \kappa \sqrt{2 \beta} \text{ clusters},\ \kappa \approx 0.72:"
    r" \text{ fewer than the fastest mode, as gaps of the start stay}",
    source="measured here, beside the mode of the mean field of arXiv 2312.10794",
    because="a mean over four starts of whole numbers of 5 to 12, which vary by one or two",
    slow=True,
)
def clusters_on_the_circle_rest_below_the_fastest_mode(key: PRNGKey) -> list[Expectation]:
    """128 random tokens to t = 1000 at beta = 36 and 100, two starts each: the number of clusters that lasts longest."""
    times = np.concatenate([[0.0], np.geomspace(1.0, 1000.0, 40)])
    ratios, spans = [], []
    for number, beta in enumerate((36.0, 100.0, 36.0, 100.0)):
        start = uniform_tokens(jax.random.fold_in(key, number), 128, 2)
        path = token_flow(start, jnp.asarray(times), beta, tolerance=1e-5)
        counts = jax.lax.map(lambda tokens, b=beta: count_clusters(tokens, 1 - 0.02 / b), path)
        clusters, span = metastable_count(counts, jnp.asarray(times))
        ratios.append(clusters / fastest_mode(beta))
        spans.append(span)
    return [
        equal("clusters that last longest over the fastest mode, mean", np.mean(ratios), 0.72, 0.2),
        at_least("from t to so many t, the shortest", np.min(spans), 2.0),
    ]
