"""The policy model: loading, log-probs, packed attention, the KV cache, and exporting weights to samplers."""
