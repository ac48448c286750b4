"""Claims of the literature, each with a random instance, a prediction and a measurement."""

import importlib
import pkgutil

from attnlab.claims.registry import REGISTRY, Claim, Comparison, Verdict, claim, claim_by_name

__all__ = ["REGISTRY", "Claim", "Comparison", "Verdict", "claim", "claim_by_name", "load_claims"]


def load_claims() -> dict[str, Claim]:
    """Import every module of claims of the package; returns the registry."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return REGISTRY
