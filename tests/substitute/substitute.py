"""A second device for machines without one: build it, register it, count what the host does.

    import substitute
    substitute.register()                  # compiles on first use (about 40 s), needs a C++ compiler
    x = torch.randn(3, device="substitute:1")
    with substitute.counting() as counts:
        step()
    assert not counts.waits

It is no GPU: it shows wrong devices, waits of the host, copies, streams and numbers of launches; it shows
neither CUDA's kernels nor its speed, and `tensor.is_cuda` is False.
"""

import sys
import types
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("substitute.cpp")
_extension = None


def register(build_directory=None):
    """Compile and register the device "substitute"; calling again does nothing."""
    global _extension
    if _extension is not None:
        return
    from torch.utils.cpp_extension import load

    _extension = load(
        "bnstats_substitute",
        [str(_SOURCE)],
        build_directory=build_directory,
        extra_cflags=["-O1", "-w"],
    )
    _extension.init()
    torch.utils.rename_privateuse1_backend("substitute")
    module = types.ModuleType("torch.substitute")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 2
    module.current_device = _extension.current_device
    module.set_device = _extension.set_device
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module._lazy_init = lambda: None
    module.device = _Device
    sys.modules["torch.substitute"] = module
    torch._register_device_module("substitute", module)
    torch.utils.generate_methods_for_privateuse1_backend()


class _Device:
    def __init__(self, device):
        self._index = device if isinstance(device, int) else torch.device(device).index or 0

    def __enter__(self):
        self._before = _extension.current_device()
        _extension.set_device(self._index)

    def __exit__(self, *_):
        _extension.set_device(self._before)


class Counts(Counter):
    """What the host did, by kind."""

    @property
    def waits(self):
        return {k: n for k, n in self.items() if k.startswith(("sync:", "copy:d2h"))}

    @property
    def copies(self):
        return {k: n for k, n in self.items() if k.startswith("copy:")}

    @property
    def launches(self):
        return sum(n for k, n in self.items() if k.startswith("op:"))

    streams: dict = {}


@contextmanager
def counting():
    """Count from here to the end of the context."""
    counts = Counts()
    _extension.reset()
    yield counts
    counts.update(_extension.counts())
    # device and stream on which kernels were launched, and how many
    counts.streams = {divmod(key, 1_000_000): n for key, n in _extension.streams().items()}
