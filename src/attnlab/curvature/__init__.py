"""Curvature of any objective, without forming the matrix: it knows no model."""
