"""Loss functions. Each is a class that a config names, such as ``rolltune.losses.grpo.GRPOLoss``."""
