"""The exact curvature of attention, in closed form, from data, weights and attention moments."""

from attnlab.attention.blocks import PARTS, AttentionHessian
from attnlab.attention.cross_layer import cross_layer_ggn
from attnlab.attention.cumulants import Cumulants, attend_query, cumulants
from attnlab.attention.cut import Cut, cut_at_attention
from attnlab.attention.describe import Factor, TermDescription, describe, describe_table
from attnlab.attention.downstream import SecondOrder, downstream_derivatives, second_order
from attnlab.attention.hessian import attention_hessian
from attnlab.attention.kronecker import KroneckerSum, Leaf, Term
from attnlab.attention.moments import AttentionMoments, attention_moments
from attnlab.attention.nearest import NearestKronecker, nearest_kronecker

__all__ = [
    "PARTS",
    "AttentionHessian",
    "AttentionMoments",
    "Cumulants",
    "Cut",
    "Factor",
    "KroneckerSum",
    "Leaf",
    "NearestKronecker",
    "SecondOrder",
    "Term",
    "TermDescription",
    "attend_query",
    "attention_hessian",
    "attention_moments",
    "cross_layer_ggn",
    "cumulants",
    "cut_at_attention",
    "describe",
    "describe_table",
    "downstream_derivatives",
    "nearest_kronecker",
    "second_order",
]
