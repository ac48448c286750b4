"""In-context learning as gradient descent: prompts, baselines, constructions, exact risks and probes."""
