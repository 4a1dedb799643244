"""What bnstats is measured against, and how to import what the models come from."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

UPDATE_BN = "torch.optim.swa_utils.update_bn"
FVCORE = "fvcore update_bn_stats"


def torch_update_bn(model: nn.Module, data: list[Tensor]) -> None:
    """Recalibrate with torch."""
    update_bn(data, model)


def fvcore_update_bn_stats(model: nn.Module, data: list[Tensor]) -> None:
    """Recalibrate with fvcore, which wants a model in training mode."""
    from fvcore.nn.precise_bn import update_bn_stats  # slow to import, and seldom needed

    model.train()
    with torch.no_grad():
        update_bn_stats(model, data, len(data))


def import_torchvision() -> ModuleType:
    """Import torchvision, also beside a CPU build of torch."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        # Its wheel is built against CUDA; its import asks for two operators that the models
        # do not need, and that live as long as this library object.
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision = importlib.import_module("torchvision")
        torchvision._operators_of_a_cpu_torch = library
        return torchvision


def import_timm() -> ModuleType:
    """Import timm, which imports torchvision."""
    import_torchvision()
    return importlib.import_module("timm")
