"""Attention computed otherwise: exactly in tiles, on graphs and as recurrences, or approximately at lower cost."""
