"""The exact curvature of attention, in closed form, from data, weights and attention moments."""
