"""The policy: loading, log-probs, packed attention, the weights that samplers are sent."""
