"""The command: find the benchmarks, run them, print one table, leave the results."""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks import readme, report
from benchmarks.machine import slug
from benchmarks.rows import Row, Run

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
FOUND = sorted(path.stem.removeprefix("bench_") for path in ROOT.glob("bench_*.py"))


def main(*chosen: str) -> None:
    """Run the benchmarks that are chosen here or named on the command line, or else all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    if not chosen:
        parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FOUND))
    parser.add_argument("--quick", action="store_true", help="see whether they run; keep nothing")
    parser.add_argument("--output", type=Path, help="keep the results here instead")
    parser.add_argument("--photos", type=Path, help="a folder with a folder for each class")
    parser.add_argument("--minutes", type=float, help="begin no new training after this many")
    options = parser.parse_args()
    wanted = set(chosen or options.names or FOUND)
    names = [name for name in FOUND if name in wanted]
    if unknown := wanted - set(FOUND):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(FOUND)}")
    with tempfile.TemporaryDirectory() as nowhere:
        output = options.output or (Path(nowhere) if options.quick else RESULTS)
        run = Run(options.quick, output / slug(), options.photos, options.minutes)
        run.folder.mkdir(parents=True, exist_ok=True)
        measured = [(name, row) for name in names for row in _start(name, run)]
    lines = [[name, *report.cells(row)] for name, row in measured]
    if lines:
        print("", *report.table(report.filled([["benchmark", *report.HEADER], *lines])), sep="\n")
    if output == RESULTS:
        readme.rewrite(RESULTS / "cpu")


def _start(name: str, run: Run) -> list[Row]:
    """Run one benchmark in a process of its own: others leave an allocator that is not new."""
    if run.quick:
        return _measure(name, run)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_measure, name, run).result()


def _measure(name: str, run: Run) -> list[Row]:
    """Run one benchmark, and leave its results."""
    module = f"benchmarks.bench_{name}"
    print(f"{module} ...", end=" ", flush=True)
    start = time.perf_counter()
    rows = importlib.import_module(module).measure(run)
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    if rows:
        command = f"python -m {module}{' --quick' * run.quick}"
        report.write(name, command, rows, run.folder)
    return rows
