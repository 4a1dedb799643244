"""``python -m benchmarks [--quick] [NAME ...]``: run every ``bench_*``, or those named."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path


def main() -> None:
    """Run the benchmarks one after the other."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(found))
    parser.add_argument("--quick", action="store_true", help="a look at whether they run")
    options = parser.parse_args()
    for name in options.names or found:
        print(f"\n{name}\n")
        importlib.import_module(f"benchmarks.{name}").main(quick=options.quick)


if __name__ == "__main__":
    main()
