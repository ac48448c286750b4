"""attnlab: a theory lab for attention in JAX.

`import attnlab as al` gives the names below, each imported when it is first used: the import itself costs no JAX. It
changes no global setting of JAX either; 64-bit mode is the command line's or the user's choice.

`al.plot` draws their results. Everything else lies in the packages: `attnlab.curvature`, `attnlab.attention`,
`attnlab.margin`, `attnlab.icl`, ...
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlab import plot as plot
    from attnlab.attention import attention_hessian as attention_hessian
    from attnlab.attention import describe as describe
    from attnlab.attention import nearest_kronecker as nearest_kronecker
    from attnlab.claims import claim as claim
    from attnlab.curvature import block_densities as block_densities
    from attnlab.curvature import check_curvature as check_curvature
    from attnlab.curvature import diagonal as diagonal
    from attnlab.curvature import eigenpairs as eigenpairs
    from attnlab.curvature import empirical_fisher as empirical_fisher
    from attnlab.curvature import fisher as fisher
    from attnlab.curvature import frobenius_norm as frobenius_norm
    from attnlab.curvature import functional as functional
    from attnlab.curvature import ggn as ggn
    from attnlab.curvature import hessian as hessian
    from attnlab.curvature import log_determinant as log_determinant
    from attnlab.curvature import solve as solve
    from attnlab.curvature import spectral_density as spectral_density
    from attnlab.curvature import trace as trace
    from attnlab.degeneracy.estimate import learning_coefficient as learning_coefficient
    from attnlab.dynamics.closed_form import attention_blocks as attention_blocks
    from attnlab.dynamics.flows import central_flow as central_flow
    from attnlab.dynamics.generalized import generalized_sharpness as generalized_sharpness
    from attnlab.dynamics.rules import update_rule as update_rule
    from attnlab.dynamics.sharpness import Tracking as Tracking
    from attnlab.dynamics.sharpness import stability as stability
    from attnlab.expectation import at_least as at_least
    from attnlab.expectation import at_most as at_most
    from attnlab.expectation import equal as equal
    from attnlab.explorer import explore as explore
    from attnlab.icl.diagnostics import against_nulls as against_nulls
    from attnlab.icl.identification import fit_family as fit_family
    from attnlab.icl.population import population_objective as population_objective
    from attnlab.icl.tasks import isotropic as isotropic
    from attnlab.icl.tasks import sample_prompts as sample_prompts
    from attnlab.losses import cross_entropy as cross_entropy
    from attnlab.losses import square_loss as square_loss
    from attnlab.margin import attention_problem as attention_problem
    from attnlab.margin import margin_probe as margin_probe
    from attnlab.margin import max_margin as max_margin
    from attnlab.margin import regularization_path as regularization_path
    from attnlab.models.adapters import at_positions as at_positions
    from attnlab.models.adapters import from_equinox as from_equinox
    from attnlab.models.adapters import from_linen as from_linen
    from attnlab.models.adapters import from_nnx as from_nnx
    from attnlab.models.attention import AttentionConfig as AttentionConfig
    from attnlab.models.attention import SelfAttention as SelfAttention
    from attnlab.models.transformer import LanguageModel as LanguageModel
    from attnlab.models.transformer import LanguageModelConfig as LanguageModelConfig
    from attnlab.models.transformer import Transformer as Transformer
    from attnlab.models.transformer import TransformerConfig as TransformerConfig
    from attnlab.objectives import batched as batched
    from attnlab.objectives import objective as objective
    from attnlab.runs.session import Session as Session
    from attnlab.sharding import shard_parameters as shard_parameters
    from attnlab.training import load_records as load_records
    from attnlab.training import minibatches as minibatches
    from attnlab.training import probe as probe
    from attnlab.training import train as train

__version__ = version("attnlab")

TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "objectives": {
        "attnlab.objectives": ("objective", "batched"),
        "attnlab.losses": ("square_loss", "cross_entropy"),
        "attnlab.models.adapters": ("from_linen", "from_nnx", "from_equinox", "at_positions"),
    },
    "curvature": {
        "attnlab.curvature": (
            "hessian",
            "ggn",
            "functional",
            "fisher",
            "empirical_fisher",
            "spectral_density",
            "block_densities",
            "eigenpairs",
            "trace",
            "diagonal",
            "frobenius_norm",
            "log_determinant",
            "solve",
            "check_curvature",
        ),
        "attnlab.runs.session": ("Session",),
        "attnlab.sharding": ("shard_parameters",),
    },
    "attention": {
        "attnlab.models.attention": ("AttentionConfig", "SelfAttention"),
        "attnlab.models.transformer": ("TransformerConfig", "Transformer", "LanguageModelConfig", "LanguageModel"),
        "attnlab.attention": ("attention_hessian", "describe", "nearest_kronecker"),
    },
    "training": {
        "attnlab.training": ("train", "probe", "minibatches", "load_records"),
        "attnlab.explorer": ("explore",),
        "attnlab.dynamics.sharpness": ("Tracking", "stability"),
        "attnlab.dynamics.rules": ("update_rule",),
        "attnlab.dynamics.generalized": ("generalized_sharpness",),
        "attnlab.dynamics.closed_form": ("attention_blocks",),
        "attnlab.dynamics.flows": ("central_flow",),
    },
    "degeneracy": {
        "attnlab.degeneracy.estimate": ("learning_coefficient",),
    },
    "margin": {
        "attnlab.margin": ("attention_problem", "max_margin", "regularization_path", "margin_probe"),
    },
    "in-context learning": {
        "attnlab.icl.tasks": ("isotropic", "sample_prompts"),
        "attnlab.icl.population": ("population_objective",),
        "attnlab.icl.diagnostics": ("against_nulls",),
        "attnlab.icl.identification": ("fit_family",),
    },
    "claims": {
        "attnlab.claims": ("claim",),
        "attnlab.expectation": ("equal", "at_most", "at_least"),
    },
}
"""The names by topic and module."""

_HOMES = {name: module for modules in TOPICS.values() for module, names in modules.items() for name in names}

__all__ = ["TOPICS", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module("attnlab.plot")
    if name not in _HOMES:
        raise AttributeError(f"module 'attnlab' has no attribute '{name}'; expected one of: {', '.join(_HOMES)}.")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "plot"})
