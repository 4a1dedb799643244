"""``python -m bnstats``, which torchrun can start too."""

import sys

from bnstats.cli import main

if __name__ == "__main__":
    sys.exit(main())
