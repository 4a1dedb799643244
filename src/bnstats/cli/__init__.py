"""The command line: ``bnstats COMMAND``, or ``python -m bnstats COMMAND``.

A command is a module with ``add_parser(subparsers)`` and ``run(options)``, which returns an exit
status if it has one to return.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import bnstats
from bnstats.cli import check, compare, demo, diagnose, measure, recompute
from bnstats.errors import BnstatsError

_COMMANDS = (demo, recompute, measure, compare, check, diagnose)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Returns:
        0 when all is well; 1 where ``check`` found something; 2 after an error, which is one line
        on stderr; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="bnstats", description="Batch-norm statistics: exact, checked, fast."
    )
    parser.add_argument("--version", action="version", version=f"bnstats {bnstats.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers).set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (BnstatsError, ImportError, OSError) as error:
        print(f"bnstats: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bnstats: interrupted", file=sys.stderr)
        return 130
