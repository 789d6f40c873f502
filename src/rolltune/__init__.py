"""RL post-training recipes for language models, in torchtune's style."""

import logging

__version__ = "0.1.0"

# torchtune and peft import these where they are installed, and they complain about kernels that are not used here.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
