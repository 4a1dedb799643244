"""What bnstats is measured against, and the models to measure on."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch


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
