"""Digits that come noisy, pale, bright or blurred: whose statistics, with how few images?

Nets are trained on clean digits. A few of the held-out digits, without labels, say what the others
look like, and each layer, behind those that have theirs, gets its statistics:

- source only: those of the training digits, as they are;
- target only: those of the few images;
- N = 4, 16, 64: a mean in which the source counts as N images (Schneider et al. 2020);
- measured weight: ``recompute_population_stats(model, [images], prior=source)``.

Errors are those of the other held-out digits, in percent. Noise has standard deviation 0.6, where
pixels go from -1 to 1; contrast is 0.3 of what it was, about 0; brightness is 1 more; blur is twice
a binomial filter of 3 x 3.
"""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnstats
from benchmarks import command
from benchmarks.rows import Row, Run, rows
from benchmarks.timing import compare
from benchmarks.workloads import Work, batches, torchvision_model
from bnstats.cli.digits import Digits, convolutional_net, evaluate, multilayer_perceptron, train

SIZES = (1, 2, 4, 16, 64)
FIXED = (4, 16, 64)
OURS = "measured weight"
WITHOUT, WITH = 'method="layerwise"', "the same, with a prior"
SHIFTED = "noise, contrast, brightness and blur"
NETS: dict[str, Callable[[], nn.Module]] = {
    "convolutional net": convolutional_net,
    "perceptron": partial(multilayer_perceptron, nn.BatchNorm1d, nn.Linear),
}


def noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.6 * torch.randn(images.shape, generator=generator)


def blur(images: Tensor, _: torch.Generator) -> Tensor:
    row, channels = torch.tensor([0.25, 0.5, 0.25]), images.shape[1]
    kernel = torch.outer(row, row).expand(channels, 1, 3, 3)
    for _ in range(2):
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        images = F.conv2d(padded, kernel, groups=channels)
    return images


CONDITIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "clean": lambda images, _: images,
    "noise": noise,
    "contrast": lambda images, _: 0.3 * images,
    "brightness": lambda images, _: images + 1,
    "blur": blur,
}


class Trained(NamedTuple):
    """A net, the statistics of what it was trained on, and the digits held out."""

    model: nn.Module
    source: bnstats.PopulationStats
    images: Tensor
    labels: Tensor

    @classmethod
    def on_digits(cls, net: str, seed: int, epochs: int) -> Trained:
        """Train a net and measure its source statistics."""
        digits = Digits.load(seed)
        torch.manual_seed(seed)
        model = NETS[net]()
        train(model, digits.train, title=f"{net}, seed {seed}", epochs=epochs, seed=seed)
        loader = digits.train.tensors[0].split(100)
        source = bnstats.measure_population_stats(model, loader, method="layerwise")
        return cls(model, source, *digits.test.tensors)


Adapt = Callable[[nn.Module, bnstats.PopulationStats, Tensor], bool]
"""Gives a model's layers statistics from the source's and some images; whether that warned."""


@torch.no_grad()
def fixed(count: float, model: nn.Module, source: bnstats.PopulationStats, images: Tensor) -> bool:
    """Let the source count as this many images."""
    weight = len(images) / (len(images) + count)

    def hook(stats: bnstats.LayerStats, layer: Any, inputs: tuple[Tensor]) -> None:
        axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
        var, mean = torch.var_mean(inputs[0].double(), axes, correction=0)
        layer.running_mean.copy_(stats.mean.lerp(mean, weight))
        layer.running_var.copy_(stats.var.lerp(var, weight))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(hook, stats))
        for name, stats in source.items()
    ]
    model.eval()(images)
    for handle in handles:
        handle.remove()
    return False


def measured(model: nn.Module, source: bnstats.PopulationStats, images: Tensor) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bnstats.BnstatsWarning)
        bnstats.recompute_population_stats(model.train(), [images], prior=source)
    return bool(caught)


WAYS: dict[str, Adapt] = {
    "source only": partial(fixed, float("inf")),
    "target only": partial(fixed, 0),
    **{f"N = {count}": partial(fixed, count) for count in FIXED},
    OURS: measured,
}


class Outcome(NamedTuple):
    """The error in percent on the other digits, and whether the adaptation warned."""

    error: float
    warned: bool


def outcomes(
    trained: Trained, condition: str, size: int, *, draws: int, seed: int, classes: int
) -> Iterator[dict[str, Outcome]]:
    """Adapt to draws of images from a number of the classes, each in every way."""
    generator = torch.Generator().manual_seed(seed)
    images = CONDITIONS[condition](trained.images, generator)
    for _ in range(draws):
        chosen = torch.randperm(10, generator=generator)[:classes]
        order = torch.randperm(len(images), generator=generator)
        candidates = order[torch.isin(trained.labels[order], chosen)]
        taken = candidates[:size]
        others = order[~torch.isin(order, taken)]
        rest = torch.utils.data.TensorDataset(images[others], trained.labels[others])
        yield {
            way: Outcome(
                warned=adapt(trained.model, trained.source, images[taken]),
                error=100 * evaluate(trained.model, rest)[1],
            )
            for way, adapt in WAYS.items()
        }


def measure(run: Run) -> list[Row]:
    """Average over draws and conditions; median and range of the seeds."""
    seeds, draws, epochs = (1, 1, 1) if run.quick else (5, 10, 10)
    errors: list[Row] = []
    for net in NETS:
        nets = [Trained.on_digits(net, seed, epochs) for seed in range(seeds)]
        for size in SIZES:
            errors += errors_of(net, nets, size, draws=draws, classes=10)
        if net == "convolutional net":
            for classes in (1, 2, 3):
                errors += errors_of(net, nets, 16, draws=draws, classes=classes)
    return errors + _costs(run)


def _costs(run: Run) -> list[Row]:
    """Measure what the prior costs beside the same recalibration without it."""
    measured: list[Row] = []
    for shape in [(2, 2, 3, 32, 32)] if run.quick else [(1, 16, 3, 224, 224), (4, 16, 3, 96, 96)]:
        model, data = torchvision_model("resnet18"), batches(*shape)
        source = bnstats.measure_population_stats(model, data)
        functions: dict[str, Work] = {
            WITHOUT: partial(bnstats.recompute_population_stats, model, data, method="layerwise"),
            WITH: partial(bnstats.recompute_population_stats, model, data, prior=source),
        }
        timings = compare(functions, rounds=1 if run.quick else 15)
        work = f"ResNet-18, {shape[0]} batch{'es' * (shape[0] > 1)}"
        at_most = {} if run.quick else {WITH: 1.05}
        measured += rows(work, str(shape[1:]), timings, WITHOUT, at_most=at_most)
    return measured


def errors_of(net: str, nets: list[Trained], size: int, *, draws: int, classes: int) -> list[Row]:
    """Return the rows of one number of images: shifted, clean, and how often it was warned."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    warned: dict[str, list[float]] = defaultdict(list)
    for seed, trained in enumerate(nets):
        found = {
            condition: list(
                outcomes(trained, condition, size, draws=draws, seed=seed, classes=classes)
            )
            for condition in CONDITIONS
        }
        shifted = [draw for c in CONDITIONS if c != "clean" for draw in found[c]]
        for way in WAYS:
            for name, drawn in ((SHIFTED, shifted), ("clean", found["clean"])):
                errors[name, way].append(statistics.mean(draw[way].error for draw in drawn))
        for name, drawn in ((SHIFTED, shifted), ("clean", found["clean"])):
            warned[name].append(100 * statistics.mean(draw[OURS].warned for draw in drawn))
    images = f"{size} image{'s' * (size > 1)}"
    if classes < 10:
        images += f" of {classes} class{'es' * (classes > 1)}"
    means = {key: statistics.mean(values) for key, values in errors.items()}
    found_rows = []
    for (name, way), values in errors.items():
        limit = None
        if way == OURS and classes == 10 and net == "convolutional net":
            limit = _limit(name, size, {w: e for (n, w), e in means.items() if n == name})
        spread = min(values), max(values)
        found_rows.append(
            Row(f"{net}, error: {name}", images, way, means[name, way], *spread, "%", at_most=limit)
        )
    for name, values in warned.items():
        low, high = min(values), max(values)
        what = f"{OURS}, warns of one kind"
        average = statistics.mean(values)
        found_rows.append(Row(f"{net}: {name}", images, what, average, low, high, "%"))
    return found_rows


def _limit(name: str, size: int, errors: dict[str, float]) -> float:
    """Return what the measured weight's error is at most to be, from those of the others."""
    if name == "clean":
        return errors["source only"] + 0.2
    if size <= 2:
        return min(error for way, error in errors.items() if way != OURS)
    return min(errors[f"N = {count}"] for count in FIXED) + 0.6


if __name__ == "__main__":
    command.main("prior")
