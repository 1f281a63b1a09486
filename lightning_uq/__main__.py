"""``python -m lightning_uq``: the command line."""

import sys

from lightning_uq.cli import main

if __name__ == "__main__":
    sys.exit(main())
