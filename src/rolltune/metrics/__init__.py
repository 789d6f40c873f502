"""Numbers of a run: the log, metrics of a step, the summary, curves, progress, timing."""
