"""How far evaluation is from normalized, after each way to recalibrate ResNet-18."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnstats
from benchmarks import command
from benchmarks.machine import device
from benchmarks.peers import FVCORE, UPDATE_BN, fvcore_update_bn_stats, torch_update_bn
from benchmarks.rows import Row, Run
from benchmarks.workloads import torchvision_model
from bnstats import Moments


def _bnstats_with(method: str) -> Callable[[nn.Module, list[Tensor]], object]:
    """Return a recalibration with bnstats."""
    return lambda model, data: bnstats.recompute_population_stats(
        model, data, method=method, correction=0
    )


WAYS: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
    UPDATE_BN: torch_update_bn,
    FVCORE: fvcore_update_bn_stats,
    'bnstats, method="pooled"': _bnstats_with("pooled"),
    'bnstats, method="layerwise"': _bnstats_with("layerwise"),
    'bnstats, method="sweeps"': _bnstats_with("sweeps"),
}


@torch.no_grad()
def _residuals(model: nn.Module, data: list[Tensor]) -> tuple[float, float]:
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


def measure(run: Run) -> list[Row]:
    """Recalibrate on batches whose scale grows from 1 to 2.5; look at the worst channel of all."""
    original = torchvision_model("resnet18")
    shape = (2, 3, 32, 32) if run.quick else (8, 3, 64, 64)
    count = 4 if run.quick else 16
    scales = torch.linspace(1, 2.5, count)
    data = [torch.randn(shape, device=device()) * float(scale) for scale in scales]
    work = f"ResNet-18 evaluated on its {count} batches of {shape}, the worst channel"
    measured = []
    for name, recalibrate in WAYS.items():
        model = copy.deepcopy(original)
        recalibrate(model, data)
        mean, var = _residuals(model, data)
        measured += [
            Row(work, "mean after normalizing", name, mean, unit="sd"),
            Row(work, "variance after normalizing", name, var, unit="relative error"),
        ]
    return measured


if __name__ == "__main__":
    command.main("residuals")
