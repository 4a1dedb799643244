"""``bnstats recompute``: a checkpoint with the population statistics of its data."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bnstats import recompute_population_stats
from bnstats.cli.checkpoints import Checkpoint
from bnstats.errors import InvalidTypeError, InvalidValueError, LayerMismatchError
from bnstats.recompute.run import METHODS

_EXAMPLES = """\
MODEL and LOADER are called without arguments, and found from the current folder too:

  bnstats recompute train:make_model train:make_loader --checkpoint in.pt --output out.pt
  torchrun --nproc-per-node 2 -m bnstats recompute train:make_model train:make_loader ...

Under torchrun LOADER is called in every process, with torch.distributed initialized, and gives each
its share of the data (a DistributedSampler does); the first process writes.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "recompute",
        help="replace a checkpoint's running statistics by the population's",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="module:callable that returns the model")
    parser.add_argument("loader", metavar="LOADER", help="module:callable that returns the batches")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="IN")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--stats", type=Path, metavar="NPZ", help="save the statistics here too")
    parser.add_argument("--overwrite", action="store_true", help="let OUT and NPZ be replaced")
    parser.add_argument("--method", choices=METHODS, default="pooled")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--max-batches", type=int, metavar="N")
    parser.add_argument("--tolerance", type=float, help="stop at standard errors no larger")
    parser.add_argument("--memory-limit", type=int, metavar="BYTES", help='for "layerwise"')
    parser.add_argument("--skip-nonfinite", action="store_true", help="leave bad batches out")
    parser.add_argument("--no-progress", action="store_true", help="show no bar")
    return parser


def run(options: argparse.Namespace) -> None:
    """Load, measure, write, print."""
    for path in (options.output, options.stats):
        _check_target(path, options.overwrite)
    checkpoint = Checkpoint.load(options.checkpoint)
    device = torch.device(options.device or _default_device())
    with _processes(device) as rank:
        model = _load_model(options.model, checkpoint).to(device)
        result = recompute_population_stats(
            model,
            _find(options.loader)(),
            method=options.method,
            device=device,
            max_batches=options.max_batches,
            tolerance=options.tolerance,
            on_nonfinite="skip" if options.skip_nonfinite else "raise",
            memory_limit=options.memory_limit,
            progress=rank == 0 and not options.no_progress,
        )
        if rank > 0:
            return
        checkpoint.replace(result.after)
        checkpoint.save(options.output)
        if options.stats is not None:
            result.after.save(options.stats)
    print(result)
    print(f"\nwritten to {options.output}")


def _load_model(where: str, checkpoint: Checkpoint) -> nn.Module:
    model = _find(where)()
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            f"{where}: expected it to return a torch.nn.Module, got {type(model).__name__}"
        )
    try:
        model.load_state_dict(checkpoint.unwrapped)
    except RuntimeError as error:
        raise LayerMismatchError(
            f"{checkpoint.path} is not of the model {where}: {error}"
        ) from error
    return model


def _find(where: str) -> Callable[[], Any]:
    """Import what ``module:callable`` names."""
    module_name, _, name = where.partition(":")
    if not module_name or not name:
        raise InvalidValueError(f"expected module:callable, got {where!r}")
    if os.getcwd() not in sys.path:  # as python -m has it, and the console script not
        sys.path.insert(0, os.getcwd())
    found: Callable[[], Any] | None = getattr(importlib.import_module(module_name), name, None)
    if not callable(found):
        raise InvalidValueError(f"{where}: module {module_name!r} has no callable {name!r}")
    return found


def _check_target(path: Path | None, overwrite: bool) -> None:
    if path is None:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}, for {path.name}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; pass --overwrite to have it replaced")


def _default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


@contextmanager
def _processes(device: torch.device) -> Iterator[int]:
    """Join the processes that torchrun has started, and yield this one's rank; else 0."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
