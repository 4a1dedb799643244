"""bnstats compare: how far one file's statistics are from another's.

Each is a checkpoint or a statistics file, in any combination.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bnstats import Drift, LayerStats, PopulationStats, RunningStats
from bnstats.cli.checkpoints import Checkpoint, common_prefixes
from bnstats.errors import LayerMismatchError
from bnstats.formatting import counted
from bnstats.recomputation.drift import compare, table, worst_first
from bnstats.recomputation.files import is_stats_file
from bnstats.traversal import first_names

Statistics: TypeAlias = PopulationStats | dict[str, RunningStats]


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compare",
        help="how far a checkpoint or a statistics file is from another",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint or statistics file")
    parser.add_argument("other", type=Path, metavar="OTHER", help="what to compare it with")
    parser.add_argument("--key", help="where the state dict is in FILE, if that is a checkpoint")
    parser.add_argument("--other-key", metavar="KEY", help="where it is in OTHER")
    parser.add_argument(
        "--strip-prefix",
        metavar="PREFIX",
        help='what stands before the layers\' names in FILE, "student." for example',
    )
    parser.add_argument(
        "--other-strip-prefix", metavar="PREFIX", help="what stands before them in OTHER"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Load both and print a table."""
    other = _load(options.other, options.other_key)
    other = _under(other, options.other, options.other_strip_prefix, "--other-strip-prefix")
    mine = _load(options.file, options.key)
    mine = _under(mine, options.file, options.strip_prefix, "--strip-prefix")
    mine = _aligned(mine, other, options)
    print(f"{counted(len(other), 'BatchNorm layer')}: {options.file} against {options.other}\n")
    if isinstance(other, PopulationStats):
        print(table(other, compare(mine, other)))
    else:
        print(_without_errors(compare(mine, {name: _known(x) for name, x in other.items()})))


def _load(path: Path, key: str | None) -> Statistics:
    if is_stats_file(path) or path.suffix == ".npz":
        return PopulationStats.load(path)
    stats = Checkpoint.load(path, key).running_stats()
    if not stats:
        raise LayerMismatchError(f"{path} has no running statistics of any layer")
    return stats


def _under(stats: Statistics, path: Path, prefix: str | None, option: str) -> Statistics:
    """Return the statistics of layers under a prefix, without it."""
    if not prefix:
        return stats
    prefix = f"{prefix.removesuffix('.')}."
    found: dict[str, Any] = {
        n.removeprefix(prefix): stats[n] for n in stats if n.startswith(prefix)
    }
    if not found:
        raise LayerMismatchError(
            f"{option}: {path} has no layer under {prefix!r}, it has {first_names(stats)}"
        )
    if isinstance(stats, PopulationStats):
        return PopulationStats(found, method=stats.method)
    return found


def _check_one_prefix(prefixes: list[str], file: Path, other: Path, option: str) -> None:
    """Refuse a file that has the other's layers twice, as one of a student and a teacher has."""
    if len(prefixes) > 1:
        raise LayerMismatchError(
            f"{file} has the layers of {other} under {len(prefixes)} prefixes: pass {option} with "
            f"one of {first_names(prefixes)}"
        )


def _aligned(
    mine: Mapping[str, Any], other: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, RunningStats]:
    """Return the first file's statistics under the other's names.

    One side's names may have a prefix, for example a wrapper's key.
    """
    taken = None
    prefixes = common_prefixes(other, mine)
    if options.strip_prefix is not None:  # it is off already
        prefixes = [prefix for prefix in prefixes if not prefix]
    _check_one_prefix(prefixes, options.file, options.other, "--strip-prefix")
    for prefix in prefixes:
        taken = {name: mine[prefix + name] for name in other}
    prefixes = [prefix for prefix in common_prefixes(mine, other) if prefix]
    _check_one_prefix(prefixes, options.other, options.file, "--other-strip-prefix")
    for prefix in prefixes:
        if len(mine) == len(other):
            taken = {name: mine[name.removeprefix(prefix)] for name in other}
    both_measured = isinstance(mine, PopulationStats) and isinstance(other, PopulationStats)
    if taken is None or (both_measured and len(mine) != len(other)):
        missing = [name for name in other if name not in mine]
        left = [name for name in mine if name not in other]
        raise LayerMismatchError(
            "not the same layers: "
            + "; ".join(
                f"{first_names(names)} in {path} alone"
                for names, path in ((left, options.file), (missing, options.other))
                if names
            )
        )
    for name, stats in taken.items():
        if stats.mean.numel() != other[name].mean.numel():
            raise LayerMismatchError(
                f"layer '{name}' has {stats.mean.numel()} channels in {options.file} and "
                f"{other[name].mean.numel()} in {options.other}"
            )
    return {name: RunningStats(stats.mean, stats.var) for name, stats in taken.items()}


def _known(running: RunningStats) -> LayerStats:
    """Return what a checkpoint knows of a layer, and NaN for the rest, which is not shown."""
    unknown = torch.full(running.mean.shape, math.nan, dtype=torch.float64)
    return LayerStats(1, 1, running.mean.double(), running.var.double(), unknown, unknown)


def _without_errors(drifts: Mapping[str, Drift]) -> str:
    """Return a table of two checkpoints' drift, which have no counts and no standard errors."""
    width = max(len("layer"), *map(len, drifts))
    lines = [
        f"{'layer':<{width}}  {'channels':>8}  {'mean shift, sd':>20}  {'var ratio':>20}  "
        f"{'KL, nats':>9}",
        f"{'':<{width}}  {'':>8}  {'rms':>9}  {'worst':>9}  {'least':>9}  {'most':>9}  {'mean':>9}",
    ]
    for name in worst_first(drifts):
        shift, ratio, kl = drifts[name]
        numbers = (
            shift.square().mean().sqrt(), shift.abs().max(), ratio.min(), ratio.max(), kl.mean(),
        )  # fmt: skip
        columns = "  ".join(f"{float(x):>9.3g}" for x in numbers)
        lines.append(f"{name:<{width}}  {len(shift):>8}  {columns}")
    return "\n".join(lines)
