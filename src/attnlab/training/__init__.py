"""The training loop and the probes inside it."""
