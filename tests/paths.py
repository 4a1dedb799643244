"""The ways that a training forward takes on a CPU; each keeps every promise."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnstats.layers import base, moving_average_gradient, moving_average_recall, moving_average_step


class Passing(TorchDispatchMode):
    """Sees every operator, and runs it as it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def directly(layer, x):
    return layer(x)


def seen_by_a_mode(layer, x):
    with Passing():
        return layer(x)


def compiled(layer, x):
    return torch.compile(layer, backend="eager", fullgraph=True)(x)


PATHS = {
    "host": directly,  # by numbers that Python reads
    "device": directly,  # by tensors alone, as where the host must not wait
    "dispatch mode": seen_by_a_mode,
    "compiled": compiled,
}


def take_tensors_for_a_devices(monkeypatch):
    """Have the layers wait for no tensor's values, as on CUDA."""
    for module in (base, moving_average_step, moving_average_recall, moving_average_gradient):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)
