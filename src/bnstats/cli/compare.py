"""``bnstats compare``: how far one file's statistics are from another's."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnstats import PopulationStats, RunningStats
from bnstats.cli.checkpoints import Checkpoint
from bnstats.errors import LayerMismatchError
from bnstats.recompute.drift import compare, table
from bnstats.recompute.files import is_stats_file


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compare",
        help="how far a checkpoint, or a statistics file, is from a statistics file",
        description=__doc__,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint or statistics file")
    parser.add_argument("stats", type=Path, metavar="STATS", help="the statistics to compare with")
    return parser


def run(options: argparse.Namespace) -> None:
    """Load both and print a table."""
    population = PopulationStats.load(options.stats)
    running = _running_stats(options.file, population)
    for name, stats in population.items():
        if running[name].mean.numel() != stats.num_features:
            raise LayerMismatchError(
                f"layer '{name}' has {running[name].mean.numel()} channels in {options.file} and "
                f"{stats.num_features} in {options.stats}"
            )
    print(f"{len(population)} BatchNorm layers: {options.file} against {options.stats}\n")
    print(table(population, compare({name: running[name] for name in population}, population)))


def _running_stats(path: Path, population: PopulationStats) -> Mapping[str, RunningStats]:
    if not is_stats_file(path):
        return Checkpoint.load(path).running_stats(population)
    stats = PopulationStats.load(path)
    if stats.keys() != population.keys():
        only = [*(stats.keys() ^ population.keys())]
        raise LayerMismatchError(
            f"{path}: these layers are in one of the two files alone: "
            + ", ".join(map(repr, sorted(only)))
        )
    return {name: RunningStats(layer.mean, layer.var) for name, layer in stats.items()}
