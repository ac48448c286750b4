"""Krylov spaces of flat symmetric products: they know no parameters and no objectives."""
