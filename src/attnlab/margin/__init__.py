"""Attention as a support vector machine."""
