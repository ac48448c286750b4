"""Training dynamics: probes, stability thresholds, flows, and the statistics of the phenomena."""
