"""RL post-training recipes for language models, in torchtune's style."""

import logging

__version__ = "0.1.0"

# torchtune and peft import torchao, which logs a complaint about optional CUDA kernels that are not used here.
logging.getLogger("torchao").setLevel(logging.ERROR)
