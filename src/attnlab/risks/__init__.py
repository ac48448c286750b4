"""Named training problems, each an objective and a random start: real data, minutes of one CPU at most."""
