"""Metrics of a run: the log, the metrics of a step, sample files, the summary, curves, progress and timing."""
