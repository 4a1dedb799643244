"""The command line: ``bnstats COMMAND``, or ``python -m bnstats COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bnstats.cli import compare, demo, recompute
from bnstats.errors import BnstatsError

_COMMANDS = (demo, recompute, compare)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 1 after an error said on stderr."""
    parser = argparse.ArgumentParser(
        prog="bnstats", description="Batch-norm statistics: exact, checked, fast."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers).set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (BnstatsError, ImportError, OSError) as error:
        print(f"bnstats: {error}", file=sys.stderr)
        return 1
    return 0
