"""The exact curvature of attention, in closed form, from data, weights and attention moments."""

from attnlab.attention.blocks import PARTS, AttentionHessian, attention_hessian, attention_hessian_from_downstream
from attnlab.attention.cross_layer import cross_layer_outer
from attnlab.attention.cumulants import Cumulants, attend_query, cumulants
from attnlab.attention.describe import Factor, TermDescription, describe, describe_table
from attnlab.attention.downstream import downstream_derivatives
from attnlab.attention.in_transformer import Cut, attention_hessian_in, cut_at_attention
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
    "Term",
    "TermDescription",
    "attend_query",
    "attention_hessian",
    "attention_hessian_from_downstream",
    "attention_hessian_in",
    "attention_moments",
    "cross_layer_outer",
    "cumulants",
    "cut_at_attention",
    "describe",
    "describe_table",
    "downstream_derivatives",
    "nearest_kronecker",
]
