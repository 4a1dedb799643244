"""The seconds that ``import bnstats`` takes once torch is there, in fresh processes."""

from __future__ import annotations

import json
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
    for _ in range(1 if run.quick else 11):
        output = subprocess.check_output([sys.executable, "-c", PROGRAM], text=True)
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
