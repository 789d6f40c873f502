"""``python -m rolltune.cli``, the same as ``tune``."""

import sys

from rolltune.cli import main

if __name__ == "__main__":
    sys.exit(main())
