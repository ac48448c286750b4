"""Attention as memory: what it stores, recalls, denoises and can memorize."""
