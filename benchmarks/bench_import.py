"""The seconds that ``import bnstats`` takes once torch is there, in fresh processes.

Python keeps the bytecode of what it has imported once, as pip does of what it installs. An
environment that forbids to write it (``PYTHONDONTWRITEBYTECODE``) would have every process compile
all sources again: the processes here do without that variable, and the first is not timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks import command
from benchmarks.rows import Row, Run
from benchmarks.timing import summary

AT_MOST = 0.1
PROGRAM = """
import json, time
seconds = [time.perf_counter()]
import torch
seconds.append(time.perf_counter())
import bnstats
seconds.append(time.perf_counter())
print(json.dumps(seconds))
"""


def measure(run: Run) -> list[Row]:
    """Import both in one process after the other."""
    torch_seconds, bnstats_seconds = [], []
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for index in range(2 if run.quick else 12):
        command_line = [sys.executable, "-c", PROGRAM]
        output = subprocess.check_output(command_line, text=True, env=environment)
        if index == 0:  # writes the bytecode
            continue
        start, between, end = json.loads(output)
        torch_seconds.append(between - start)
        bnstats_seconds.append(end - between)
    return [
        Row("import", "fresh process", "torch", *summary(torch_seconds)),
        Row(
            *("import", "fresh process", "bnstats after torch"),
            *summary(bnstats_seconds),
            at_most=AT_MOST,
        ),
    ]


if __name__ == "__main__":
    command.main("import")
