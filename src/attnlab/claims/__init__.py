"""Claims of the literature, each with a random instance, and what is expected of it."""

import importlib
import pkgutil

from attnlab.claims.registry import REGISTRY, Claim, Verdict, claim, claim_by_name
from attnlab.expectation import Expectation, at_least, at_most, between, equal

__all__ = [
    "REGISTRY",
    "Claim",
    "Expectation",
    "Verdict",
    "at_least",
    "at_most",
    "between",
    "claim",
    "claim_by_name",
    "equal",
    "load_claims",
]


def load_claims() -> dict[str, Claim]:
    """Import every module of claims of the package; returns the registry."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return REGISTRY
