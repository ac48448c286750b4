"""Claims of the literature, each with a random instance, a prediction and a measurement."""
