"""bnstats demo: batch-norm statistics on handwritten digits, in two acts.

The first looks at the running averages of a convolutional net while it trains: how far they are
from the population statistics of the very digits it is trained on, and what recalibration
fixes. The second normalizes over 32 digits, over 2, and over 2 with moving averages.

With --photos it fine-tunes a network with its ImageNet weights on photographs instead, and shows
what recalibration is worth there: a few minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from bnstats import (
    BatchStatsRecord,
    CenteredLinear,
    MovingAverageBatchNorm1d,
    Recalibration,
    recompute_population_stats,
    record_batch_stats,
)
from bnstats.cli import photos, photos_demo
from bnstats.cli.digits import Digits, convolutional_net, evaluate, multilayer_perceptron, train
from bnstats.errors import InvalidValueError

EPOCHS = 10


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="train on handwritten digits, see the statistics' errors, fix them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="decides the data split, the weights and the order of batches",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        help=f"1 or more; default: {EPOCHS}, or {photos_demo.EPOCHS} with --photos",
    )
    parser.add_argument(
        "--photos",
        type=Path,
        nargs="?",
        const=photos.STAMPS,
        metavar="DIR",
        help="fine-tune on photographs: a folder with a folder of pictures for each class (without "
        "DIR: %(const)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bnstats-demo.png"),
        help="where the figure goes (default: %(default)s)",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Train, watch, recalibrate, print, draw."""
    figure_of = _import_figure()
    _check(options)
    if options.photos is not None:
        photos_demo.run(options)
        return
    if options.epochs is None:
        options.epochs = EPOCHS
    digits = Digits.load(options.seed)
    with _one_thread():
        looks = _first_act(digits, options)
        trainings = _second_act(digits, options)
    _print_first(looks, digits)
    _print_second(trainings, digits)
    figure_of(looks, trainings).savefig(options.output, dpi=150)
    print(f"\nfigure saved to {options.output}")


def _check(options: argparse.Namespace) -> None:
    """Refuse bad options before the training starts."""
    from matplotlib.backend_bases import FigureCanvasBase

    if options.epochs is not None and options.epochs < 1:
        raise InvalidValueError(f"--epochs: expected 1 or more, got {options.epochs}")
    if not 0 <= options.seed < 2**32:
        raise InvalidValueError(f"--seed: expected 0 to 2^32 - 1, got {options.seed}")
    if not options.output.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {options.output.parent}")
    suffix = options.output.suffix.removeprefix(".")
    if suffix not in FigureCanvasBase.filetypes:
        raise InvalidValueError(
            f"--output: expected the file name of a figure (.png, .pdf), got {options.output}"
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Nets so small are faster on one thread, and give the same results on any machine's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Look:
    """Measurements of a model after an epoch.

    ``running`` and ``population`` are (loss, error) on the held-out digits, with the running
    averages that training left and with the population statistics of the training digits.
    """

    epoch: int
    running: tuple[float, float]
    population: tuple[float, float]
    result: Recalibration


@dataclass
class Training:
    """A training with a normalization batch: held-out errors by epoch, statistics by batch."""

    title: str
    batch: int
    make: Callable[[], nn.Module]
    errors: list[float] = field(default_factory=list)
    record: BatchStatsRecord | None = None


def _first_act(digits: Digits, options: argparse.Namespace) -> list[Look]:
    torch.manual_seed(options.seed)
    model = convolutional_net()
    looks: list[Look] = []

    def look(epoch: int) -> None:
        running = evaluate(model, digits.test)
        result = recompute_population_stats(model, DataLoader(digits.train, 32))
        population = evaluate(model, digits.test)
        result.undo()  # the measurement does not affect the training
        looks.append(Look(epoch, running, population, result))

    train(
        model,
        digits.train,
        title="1: convolutional net",
        epochs=options.epochs,
        seed=options.seed,
        after_epoch=look,
    )
    return looks


def _second_act(digits: Digits, options: argparse.Namespace) -> list[Training]:
    plain = partial(multilayer_perceptron, nn.BatchNorm1d, nn.Linear)
    moving = partial(multilayer_perceptron, MovingAverageBatchNorm1d, CenteredLinear)
    trainings = [
        Training("batch norm, 32", 32, plain),
        Training("batch norm, 2", 2, plain),
        Training("moving averages, 2", 2, moving),
    ]
    for training in trainings:
        torch.manual_seed(options.seed)
        model = training.make()

        def look(_: int, model: nn.Module = model, training: Training = training) -> None:
            training.errors.append(evaluate(model, digits.test)[1])

        with record_batch_stats(model, ["norm2"]) as training.record:
            train(
                model,
                digits.train,
                title=f"2: {training.title}",
                epochs=options.epochs,
                seed=options.seed,
                normalization_batch=training.batch,
                after_epoch=look,
            )
    return trainings


def _print_first(looks: list[Look], digits: Digits) -> None:
    first, last = looks[0], looks[-1]
    print(
        f"\n1. How far are the running averages from the population statistics of the "
        f"{len(digits.train):,} digits trained on?\n\n"
        f"After epoch 1, the learning rate still high:\n\n{first.result}\n\n"
        f"After epoch {last.epoch}, the learning rate annealed to 0:\n\n{last.result}\n\n"
        f"{len(digits.test)} held-out digits, evaluated with\n\n"
        f"{'':>8}  {'running averages':>18}  {'population statistics':>22}\n"
        f"{'epoch':>8}  {'loss':>9} {'error':>8}  {'loss':>13} {'error':>8}"
    )
    for look in looks:
        print(
            f"{look.epoch:>8}  {look.running[0]:>9.3f} {look.running[1]:>8.1%}  "
            f"{look.population[0]:>13.3f} {look.population[1]:>8.1%}"
        )


def _print_second(trainings: list[Training], digits: Digits) -> None:
    print(
        f"\n2. What does the batch that normalizes do? A perceptron of five layers, every\n"
        f"gradient from 32 digits; error on {len(digits.test)} held-out digits after the last "
        f"epoch:\n"
    )
    for training in trainings:
        print(f"{training.title:>20}  {training.errors[-1]:>7.1%}")


def _import_figure() -> Any:
    try:
        from bnstats.cli.figure import figure_of
    except ImportError as error:
        raise ImportError("the demo draws with matplotlib: pip install matplotlib") from error
    return figure_of
