"""RL post-training recipes for language models, in torchtune's style."""

__version__ = "0.1.0"
