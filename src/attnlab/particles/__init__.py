"""Tokens as interacting particles on the sphere: attention flows, their energies, laws and clusters."""
