"""Dropout, stochastic depth and the like, which are off in evaluation.

Averages that training made are of values under dropout. With all weights as they are, evaluation
gives layers other values: the mean may be the same, the variance is less ("variance shift": Li et
al. 2018, "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift",
arXiv:1801.05134).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bnstats.hooks import Hook

_OF_TORCH = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU),
)


def random_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose only difference in training may be that they act at random.

    They are torch's dropout and RReLU, and other packages' modules without parts, parameters and
    buffers: stochastic depth, added noise. A larger module that calls ``F.dropout`` by its own
    mode is not found.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _OF_TORCH)
        or not (
            type(module).__module__.startswith("torch.nn.")
            or any(True for _ in module.children())
            or any(True for _ in module.parameters())
            or any(True for _ in module.buffers())
        )
    ]


@contextmanager
def on_as_in_training(modules: list[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Let these modules act as in training in every forward; random numbers go on as without."""
    device = torch.device(device)
    handles = [module.register_forward_pre_hook(Hook(_turn_on)) for module in modules]
    devices = {} if device.type == "cpu" else {"device_type": device.type}
    try:
        with torch.random.fork_rng([device] if devices else [], **devices):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _turn_on(module: nn.Module, _: Any) -> None:
    module.training = True
