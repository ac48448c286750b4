"""Optimizers as the theory of their dynamics sees them: one row each, which edges, probes and flows read alike.

Gradient descent on a quadratic with Hessian eigenvalue h iterates w -> (1 - eta h) w, stable for h < 2 / eta. An
optimizer that preconditions by P does so for the eigenvalues of P^-1/2 H P^-1/2, and momentum moves the threshold
(Cohen et al., arXiv 2103.00065, section 2 and appendix B; Cohen et al., arXiv 2207.14484, section 2).
"""

from attnlab.dynamics.rules.adaptive import Adafactor, Adam, AdamW, RMSProp
from attnlab.dynamics.rules.base import Moments, UpdateRule, constant_rate, preconditioner_after_step
from attnlab.dynamics.rules.geometric import BlockCoordinate, Lion, Muon, SignDescent, SpectralDescent
from attnlab.dynamics.rules.linear import Averaged, GradientDescent, HeavyBall, Nesterov
from attnlab.dynamics.rules.rotated import Shampoo, Soap
from attnlab.dynamics.rules.step import StepEdge, edge_of_step
from attnlab.dynamics.rules.table import RULES, update_rule

__all__ = [
    "RULES",
    "Adafactor",
    "Adam",
    "AdamW",
    "Averaged",
    "BlockCoordinate",
    "GradientDescent",
    "HeavyBall",
    "Lion",
    "Moments",
    "Muon",
    "Nesterov",
    "RMSProp",
    "Shampoo",
    "SignDescent",
    "Soap",
    "SpectralDescent",
    "StepEdge",
    "UpdateRule",
    "constant_rate",
    "edge_of_step",
    "preconditioner_after_step",
    "update_rule",
]
