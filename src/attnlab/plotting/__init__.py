"""Pictures, made from arrays alone."""
