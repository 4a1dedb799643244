"""The command line: ``bnstats COMMAND``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bnstats", description="Batch-norm statistics.")
    parser.parse_args(arguments)
    return 0
