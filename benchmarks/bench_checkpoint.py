"""The running averages that come with a network's weights, on pictures of another kind.

How far they are from the pictures' own statistics at three sizes, and what becomes of the
classifier when they are replaced: its head was trained on features that the old ones made. A
prior's weight is measured from the spread between the source's samples. A checkpoint holds none,
so the pictures' own stands in for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import bnstats
from benchmarks import command, report
from benchmarks.photographs import missing, say, synthetic_photos
from benchmarks.rows import Row, Run
from bnstats import Recalibration
from bnstats.cli.photos import Photos, accuracy, efficientnet_lite0

SIZES = (96, 128, 224)
BATCH = 16
FEW = 16

Recalibrate: TypeAlias = Callable[[nn.Module, list[Tensor]], Recalibration]


def _pooled(model: nn.Module, batches: list[Tensor]) -> Recalibration:
    return bnstats.recompute_population_stats(model, batches)


def _layerwise(model: nn.Module, batches: list[Tensor]) -> Recalibration:
    return bnstats.recompute_population_stats(model, batches, method="layerwise")


def _prior(model: nn.Module, batches: list[Tensor]) -> Recalibration:
    return bnstats.recompute_population_stats(model, batches, prior=_source(model, batches))


def _prior_of_few(model: nn.Module, batches: list[Tensor]) -> Recalibration:
    source = _source(model, batches)
    return bnstats.recompute_population_stats(model, [torch.cat(batches)[:FEW]], prior=source)


def _source(model: nn.Module, batches: list[Tensor]) -> bnstats.PopulationStats:
    """Return the running statistics that came, with the spread between the pictures."""
    stats = dict(bnstats.measure_population_stats(model, batches))
    for name, layer in stats.items():
        buffers = dict(model.get_submodule(name).named_buffers())
        mean, var = (buffers[key].double() for key in ("running_mean", "running_var"))
        stats[name] = replace(layer, mean=mean, var=var)
    return bnstats.PopulationStats(stats)


REPLACED: dict[str, Recalibrate] = {
    "pooled": _pooled,
    "layerwise": _layerwise,
    "prior=": _prior,
    f"prior=, {FEW} pictures": _prior_of_few,
}
"""By what the running averages are replaced."""


class Answers(NamedTuple):
    """What a classifier makes of pictures.

    Attributes:
        confidence: the mean of its largest probability.
        changed: the percentage of other answers than with the averages that came.
        new_head: accuracy in percent on held-out pictures of a head trained on its features.
    """

    confidence: float
    changed: float
    new_head: float


class Checkpoint(NamedTuple):
    """What is found at one size."""

    drift: dict[str, bnstats.Drift]
    answers: dict[str, Answers]


def measure(run: Run) -> list[Row]:
    """Look at the averages at each size; keep a table."""
    if (lacking := missing(run.photos)) is not None:
        say(run.quick, lacking)
        if not run.quick:
            return []
    found = {}
    for size in SIZES[:1] if run.quick else SIZES:
        if lacking is None:
            photos, model = Photos.load(run.photos, size), efficientnet_lite0()
        else:
            photos, model = synthetic_photos(size), small_classifier()
        found[size] = look(model, photos)
    report.write_table(run.folder / "checkpoint_table.md", "checkpoint", table(found))
    return [row for size, checkpoint in found.items() for row in _rows(size, checkpoint)]


def small_classifier() -> nn.Sequential:
    """Return what stands in for the network."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


def look(model: nn.Module, photos: Photos) -> Checkpoint:
    """Evaluate a classifier with its own averages, and with each kind of replacement."""
    images = photos.train.tensors[0]
    torch.manual_seed(0)
    batches = list(images[torch.randperm(len(images))].split(BATCH))  # they come class by class
    logits, new_head = _evaluate(model, photos)
    own = logits.argmax(1)
    answers = {"as they come": Answers(_confidence(logits), 0.0, new_head)}
    drift = {}
    for name, recalibrate in REPLACED.items():
        result = recalibrate(model, batches)
        drift[name] = result.drift
        logits, new_head = _evaluate(model, photos)
        changed = 100 * float((logits.argmax(1) != own).float().mean())
        answers[name] = Answers(_confidence(logits), changed, new_head)
        result.undo()
    return Checkpoint(drift["pooled"], answers)


def _confidence(logits: Tensor) -> float:
    return float(logits.softmax(1).amax(1).mean())


def _evaluate(model: nn.Module, photos: Photos) -> tuple[Tensor, float]:
    """Return the classifier's logits of all pictures, and the accuracy of a new head."""
    images = torch.cat([photos.train.tensors[0], photos.test.tensors[0]])
    logits, features = features_of(model.eval(), images, BATCH)
    of_train, of_test = features.split([len(photos.train), len(photos.test)])
    head = linear_head(of_train, photos.train.tensors[1])
    return logits, 100 * accuracy(head, TensorDataset(of_test, photos.test.tensors[1]))


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return the logits, and what the last linear layer gets."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    features: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    try:
        logits = torch.cat([model(part) for part in images.split(batch)])
    finally:
        hook.remove()
    return logits, torch.cat(features)


def linear_head(inputs: Tensor, labels: Tensor) -> nn.Linear:
    """Fit logistic regression with weight decay."""
    torch.manual_seed(0)
    head = nn.Linear(inputs.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(inputs), labels) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def _rows(size: int, found: Checkpoint) -> list[Row]:
    work, pixels = "running averages that come with weights", f"{size} pixels"
    shifts = [_rms(drift.mean_shift) for drift in found.drift.values()]
    ratios = [_rms(drift.var_ratio.log()) for drift in found.drift.values()]
    figures = {
        "shift of the mean, rms of a layer": (shifts, "sd"),
        "logarithm of the variances' ratio, rms of a layer": (ratios, ""),
    }
    rows = [
        Row(work, pixels, what, statistics.median(values), min(values), max(values), unit)
        for what, (values, unit) in figures.items()
    ]
    for name, answers in found.answers.items():
        rows += [
            Row(work, pixels, f"{name}: mean confidence", answers.confidence, unit=""),
            Row(work, pixels, f"{name}: accuracy of a new head", answers.new_head, unit="%"),
        ]
        if name in REPLACED:
            rows.append(Row(work, pixels, f"{name}: other answers", answers.changed, unit="%"))
    return rows


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def table(found: dict[int, Checkpoint]) -> list[list[str]]:
    """Return the lines of the README's table."""
    header = ["pixels", "shift of the mean, median and worst layer", "running statistics"]
    lines = [[*header, "confidence", "other answers", "new head"]]
    for size, checkpoint in found.items():
        shifts = [_rms(drift.mean_shift) for drift in checkpoint.drift.values()]
        shift = f"{statistics.median(shifts):.2f}, {max(shifts):.2f} sd"
        for name, answers in checkpoint.answers.items():
            first = [str(size), shift] if name not in REPLACED else ["", ""]
            changed = f"{answers.changed:.0f} %" if name in REPLACED else ""
            figures = [f"{answers.confidence:.2f}", changed, f"{answers.new_head:.1f} %"]
            lines.append([*first, name, *figures])
    return lines


if __name__ == "__main__":
    command.main("checkpoint")
