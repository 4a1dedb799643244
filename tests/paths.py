"""The three ways that a training forward takes on a CPU; each keeps every promise."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Passing(TorchDispatchMode):
    """Sees every operator, and runs it as it is: a layer then counts by tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def on_host(layer, x):
    """The statistics move by numbers that Python reads."""
    return layer(x)


def intercepted(layer, x):
    """They move by tensors, as on a device."""
    with Passing():
        return layer(x)


def compiled(layer, x):
    """They move by tensors within one graph of torch.compile."""
    return torch.compile(layer, backend="eager", fullgraph=True)(x)


@pytest.fixture(params=[on_host, intercepted, compiled], ids=lambda path: path.__name__)
def run(request):
    """A function of a layer and its input, for each of the ways."""
    if request.param is compiled:
        torch.compiler.reset()
    return request.param
