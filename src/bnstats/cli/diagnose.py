"""bnstats diagnose: is it the batch norm? A verdict, its evidence, the fix."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnstats import diagnose
from bnstats.cli import measuring
from bnstats.cli.callables import find
from bnstats.cli.checkpoints import Checkpoint

_EXAMPLES = """\
MODEL, LOADER and TARGET are called without arguments, METRIC with a model and a batch; all are
found from the current folder too. LOADER gives the training data, in batches as in training:

  bnstats diagnose train:make_model train:make_loader --checkpoint in.pt
  bnstats diagnose train:make_model train:make_loader --checkpoint in.pt \\
      --target train:make_validation_loader --metric train:is_correct

METRIC returns a number for each sample, the larger the better.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "diagnose",
        help="find out whether a model evaluates badly because of its batch norm",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="module:callable that returns the model")
    parser.add_argument("loader", metavar="LOADER", help="module:callable that returns the batches")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="IN",
        help="loaded into the model; default: the model as MODEL returns it",
    )
    measuring.add_checkpoint_arguments(parser)
    parser.add_argument(
        "--target",
        help="module:callable that returns batches of the data that the model is evaluated on",
    )
    parser.add_argument(
        "--metric", help="module:callable, a function metric(model, batch), the larger the better"
    )
    parser.add_argument("--expected", type=float, metavar="VALUE", help="what the metric should be")
    measuring.add_reading_arguments(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Load, diagnose, print."""
    device = measuring.device_of(options)
    model = measuring.make_model(options)
    if options.checkpoint is not None:
        checkpoint = Checkpoint.load(options.checkpoint, options.key, options.strip_prefix)
        checkpoint.load_into(model, options.model)
    metric: Callable[..., Any] | None = None
    if options.metric is not None:
        metric = find(options.metric, "METRIC", "model", "batch")
    diagnosis = diagnose(
        model.to(device),
        find(options.loader, "LOADER")(),
        metric=metric,
        target=None if options.target is None else find(options.target, "TARGET")(),
        expected=options.expected,
        device=device,
        max_batches=options.max_batches,
    )
    print(diagnosis)
