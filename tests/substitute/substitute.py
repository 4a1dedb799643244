"""A second device for machines without one: build it, register it, count what the host does.

    substitute.register()  # compiles on first use, about 40 s: needs a C++ compiler and ninja
    x = torch.randn(3, device="substitute:1")
    with substitute.counting() as counts:
        step()
    assert not counts.waits

It has two indices, memory of its own, streams, and no mixing with the host's tensors. It is no
GPU: it shows neither CUDA's kernels nor its speed, and ``tensor.is_cuda`` is False.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

_NAME = "bnstats_substitute"
_SOURCE = Path(__file__).with_name("substitute.cpp")
_FOLDER = Path(__file__).parents[2] / "build" / "substitute"
"""Where a build stays for the next run."""

_extension = None


def missing():
    """Return what this machine lacks for the device, or None."""
    if _library().exists():
        return None
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "a C++ compiler"
    return None if shutil.which("ninja", path=_path()) else "ninja"


def register():
    """Compile the device "substitute" unless that is done, and register it in this process.

    Before the first backward: autograd makes its queues for all devices then.
    """
    global _extension
    if _extension is not None:
        return
    _extension = _imported(_library()) if _library().exists() else _built()
    _extension.init()
    torch.utils.rename_privateuse1_backend("substitute")
    torch._register_device_module("substitute", _device_module())
    torch.utils.generate_methods_for_privateuse1_backend()


def _library():
    """Return the path of the build for this source, torch and Python."""
    made_of = (_SOURCE.read_text(), torch.__version__, sys.implementation.cache_tag)
    digest = hashlib.sha256("".join(made_of).encode()).hexdigest()[:16]
    return _FOLDER / digest / f"{_NAME}.so"


def _path():
    """Return the search path, with the folder where pip puts ninja."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def _built():
    """Compile, keep the library, and return it imported."""
    from torch.utils.cpp_extension import load

    library, before = _library(), os.environ.get("PATH", "")
    library.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: a build that was killed leaves a lock, for which the next would wait.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        os.environ["PATH"] = _path()
        try:
            extension = load(
                _NAME, [str(_SOURCE)], build_directory=folder, extra_cflags=["-O1", "-w"]
            )
        finally:
            os.environ["PATH"] = before
        os.replace(extension.__file__, library)
    return extension


def _imported(library):
    spec = importlib.util.spec_from_file_location(_NAME, library)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def _device_module():
    """Return what torch knows as ``torch.substitute``."""
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
    return module


@contextmanager
def without_float64():
    """Let the device refuse float64, as MPS does."""
    _extension.set_float64(False)
    try:
        yield
    finally:
        _extension.set_float64(True)


@contextmanager
def without_memory():
    """Let every allocation on the device fail."""
    _extension.set_memory(False)
    try:
        yield
    finally:
        _extension.set_memory(True)


class _Device:
    def __init__(self, device):
        self._index = device if isinstance(device, int) else torch.device(device).index or 0

    def __enter__(self):
        self._before = _extension.current_device()
        _extension.set_device(self._index)

    def __exit__(self, *_):
        _extension.set_device(self._before)


class Counts(Counter):
    """What the host did, by kind; ``streams`` counts launches by device and stream."""

    def __init__(self):
        super().__init__()
        self.streams = {}

    @property
    def waits(self):
        return {k: n for k, n in self.items() if k.startswith(("sync:", "copy:d2h"))}

    @property
    def copies(self):
        return {k: n for k, n in self.items() if k.startswith("copy:")}

    @property
    def launches(self):
        return sum(n for k, n in self.items() if k.startswith("op:"))


@contextmanager
def counting():
    """Count from here to the end of the context."""
    counts = Counts()
    _extension.reset()
    yield counts
    counts.update(_extension.counts())
    counts.streams = {divmod(key, 1_000_000): n for key, n in _extension.streams().items()}
