"""Measuring a model: held-out accuracy, samples, verdicts, pass@k, comparisons. Imported by recipes only."""
