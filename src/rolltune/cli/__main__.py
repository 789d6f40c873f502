"""``python -m rolltune.cli``, the same as ``tune``."""

import sys

from rolltune.cli import main

sys.exit(main())
