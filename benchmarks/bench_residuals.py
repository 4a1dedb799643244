"""How far evaluation is from normalized, after each way to recalibrate ResNet-18."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import bnstats
from benchmarks.peers import import_torchvision
from benchmarks.report import RESULTS, machine
from bnstats import Moments


def fvcore(model: nn.Module, data: list[Tensor]) -> None:
    """Recalibrate with fvcore, which wants a model in training mode."""
    model.train()
    with torch.no_grad():
        update_bn_stats(model, data, len(data))


def bnstats_with(method: str) -> Callable[[nn.Module, list[Tensor]], object]:
    """Return a recalibration with bnstats."""
    return lambda model, data: bnstats.recompute_population_stats(
        model, data, method=method, correction=0
    )


WAYS: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
    "torch.optim.swa_utils.update_bn": lambda model, data: update_bn(data, model),
    "fvcore update_bn_stats": fvcore,
    'bnstats, method="pooled"': bnstats_with("pooled"),
    'bnstats, method="layerwise"': bnstats_with("layerwise"),
    'bnstats, method="sweeps"': bnstats_with("sweeps"),
}


@torch.no_grad()
def residuals(model: nn.Module, data: list[Tensor]) -> tuple[float, float]:
    """Return the largest mean and the largest relative error of a variance after normalizing.

    Over all data in evaluation mode, of each layer's output before weight and bias, in every
    channel whose variance is above eps; it should be 0 and var / (var + eps).
    """
    moments: dict[_BatchNorm, Moments] = {}

    def observe(layer: _BatchNorm, args: tuple[Tensor, ...]) -> None:
        batch = Moments.from_batch(args[0])
        moments[layer] = moments[layer] + batch if layer in moments else batch

    model.eval()
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.register_forward_pre_hook(observe)
    for x in data:
        model(x)
    means, variances = [0.0], [0.0]
    for layer, seen in moments.items():
        var, alive = seen.var(0), seen.var(0) > layer.eps
        scale = (layer.running_var.double() + layer.eps).sqrt()
        mean = (seen.mean - layer.running_mean.double()) / scale
        error = var / scale.square() * (var + layer.eps) / var - 1
        means.append(float(mean[alive].abs().max()))
        variances.append(float(error[alive].abs().max()))
    return max(means), max(variances)


def main(quick: bool = False) -> None:
    """Recalibrate on 16 batches whose scale grows from 1 to 2.5."""
    torch.manual_seed(0)
    original = import_torchvision().models.resnet18()
    count = 4 if quick else 16
    data = [torch.randn(8, 3, 64, 64) * (1 + 1.5 * i / (count - 1)) for i in range(count)]
    lines = [
        f"`python -m benchmarks.bench_residuals` on {machine()}.",
        "",
        f"ResNet-18, {count} batches of (8, 3, 64, 64) whose scale grows from 1 to 2.5: the worst",
        "channel of all layers, over all data in evaluation mode.",
        "",
        "| recalibrated by | mean after normalizing, sd | variance, relative error |",
        "| --- | --- | --- |",
    ]
    for name, recalibrate in WAYS.items():
        model = copy.deepcopy(original)
        recalibrate(model, data)
        mean, var = residuals(model, data)
        lines.append(f"| {name} | {mean:.2g} | {var:.2g} |")
    text = "\n".join([*lines, ""])
    print(text)
    if not quick:
        (RESULTS / "residuals.md").write_text(text)


if __name__ == "__main__":
    main("--quick" in sys.argv)
