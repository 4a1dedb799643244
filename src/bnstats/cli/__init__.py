"""The command line: ``bnstats COMMAND``, or ``python -m bnstats COMMAND``.

A command is a module with ``add_parser(subparsers)`` and ``run(options)``, which returns an exit
status if it has one to return.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
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
        on stderr; 130 after Ctrl-C; 141 where what reads the output, as ``head`` does, has ended.
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
        status: int = options.run(options) or 0
        sys.stdout.flush()
        return status
    except (BnstatsError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE  # as a shell says of a process that the signal ended
        print(f"bnstats: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bnstats: interrupted", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has ended; then nothing more is written to it.

    Python ignores SIGPIPE, and the same error can come from a loader's processes.
    """
    if sys.platform == "win32":
        return False
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # a caller of main() has replaced it
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    ended = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if ended:  # Python flushes once more when it exits, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return ended
