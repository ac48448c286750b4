"""Data: generators that are pure functions of a key, and the real data that packages carry."""
