"""``bnstats demo``: how far running averages are off, on real data, and what mends them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from bnstats import Recalibration, recompute_population_stats
from bnstats.cli.digits import Digits, convolutional_net, evaluate, train

_BATCH_SIZE = 32
_LEARNING_RATE = 0.1


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="train on handwritten digits, see the running averages' errors, mend them",
        description=__doc__,
    )
    parser.add_argument("--seed", type=int, default=0, help="of data split, weights and batches")
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
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
    if not options.output.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {options.output.parent}")
    digits = Digits.load(options.seed)
    torch.manual_seed(options.seed)
    story = Story(convolutional_net(), digits)
    train(
        story.model,
        digits.train,
        batch_size=_BATCH_SIZE,
        epochs=options.epochs,
        lr=_LEARNING_RATE,
        seed=options.seed,
        after_epoch=story.look,
    )
    _tell(story)
    figure_of(story.epochs).savefig(options.output, dpi=150)
    print(f"\nfigure saved to {options.output}")


@dataclass(frozen=True)
class Epoch:
    """What a look at the model after an epoch found.

    ``running`` and ``population`` are (loss, error) on the held-out digits, with the running
    averages that training left and with the population statistics of the training digits.
    """

    number: int
    running: tuple[float, float]
    population: tuple[float, float]
    result: Recalibration


@dataclass
class Story:
    """A model that is looked at after every epoch of its training."""

    model: nn.Module
    digits: Digits
    epochs: list[Epoch] = field(default_factory=list)

    def look(self, number: int) -> None:
        """Evaluate before and after a recalibration, which is undone: training goes on as ever."""
        running = evaluate(self.model, self.digits.test)
        loader = DataLoader(self.digits.train, _BATCH_SIZE)
        result = recompute_population_stats(self.model, loader)
        population = evaluate(self.model, self.digits.test)
        result.undo()
        self.epochs.append(Epoch(number, running, population, result))


def _tell(story: Story) -> None:
    first, last = story.epochs[0], story.epochs[-1]
    print(
        f"\nHow far are the running averages from the population statistics of the "
        f"{len(story.digits.train):,} digits trained on?\n\n"
        f"After epoch 1, the learning rate still high:\n\n{first.result}\n\n"
        f"After epoch {last.number}, the learning rate annealed to 0:\n\n{last.result}\n\n"
        f"{len(story.digits.test)} held-out digits, evaluated with\n\n"
        f"{'':>8}  {'running averages':>18}  {'population statistics':>22}\n"
        f"{'epoch':>8}  {'loss':>9} {'error':>8}  {'loss':>13} {'error':>8}"
    )
    for epoch in story.epochs:
        print(
            f"{epoch.number:>8}  {epoch.running[0]:>9.3f} {epoch.running[1]:>8.1%}  "
            f"{epoch.population[0]:>13.3f} {epoch.population[1]:>8.1%}"
        )


def _import_figure() -> Any:
    try:
        from bnstats.cli.figure import figure_of
    except ImportError as error:
        raise ImportError("the demo draws with matplotlib: pip install 'bnstats[demo]'") from error
    return figure_of
