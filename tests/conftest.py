"""Makes torchvision importable beside a CPU build of torch, and names what a test needs."""

import functools
import gc
import importlib
import os
import sys
from contextlib import contextmanager

# Two processes share the cores: threads that wait must not spin, which took most of the CPU time.
# OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

import paths
from substitute import substitute as substitute_device

collect_ignore_glob = ["recipes/*"]  # test_recipes.py runs them

# The same examples in every run; a busy machine is no failure.
settings.register_profile("bnstats", deadline=None, derandomize=True)
settings.load_profile("bnstats")


def _import_torchvision():
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # Its wheel is built against CUDA: its import asks for two operators of its own library,
        # which does not load beside a CPU torch. The models need neither.
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library
    return None


# Kept for the life of the process: the schemas go when the library does.
_LIBRARY = _import_torchvision()


# Files that take longest, the longest first: else one process ends long before the other.
SLOWEST = (
    *("test_convert_models", "test_benchmarks", "test_distributed", "test_convert_after"),
    *("test_timm", "test_layers_devices", "test_holding", "test_integrations_transformers"),
    *("test_selective_checkpointing", "test_invariants", "test_typing", "test_counters"),
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=paths.PATHS)
def run(request, monkeypatch):
    """A function of a layer and its input, for each of the ways that a forward may take."""
    if request.param == "device":
        paths.take_tensors_for_a_devices(monkeypatch)
    if request.param == "compiled":
        torch.compiler.reset()  # it keeps few graphs of one forward, and no test's are another's
    yield paths.PATHS[request.param]
    if request.param == "compiled":
        torch.compiler.reset()


@pytest.fixture
def one_thread():
    """Tiny batches gain nothing by a second thread, and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cuda(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # Convolutions of ten bits would hide what is compared to the CPU's.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (*SLOWEST, item.path.stem).index(item.path.stem))
    # Before any test: autograd makes its queues for all devices at the first backward.
    names = {"device", "substitute", "substitute_module"}
    if any(names & {*getattr(item, "fixturenames", ())} for item in items):
        _register_substitute()
    # What was imported stays: trainers collect garbage, and would look at millions of objects.
    gc.collect()
    gc.freeze()


@functools.cache
def _register_substitute():
    """Register the device; return what this machine lacks for it, why its build failed, or None."""
    # torch.accelerator knows one kind of device, and prefers this one: CUDA's cases that ask it
    # for streams and indices would be about the substitute.
    if torch.cuda.is_available():
        return "a process without CUDA: CUDA_VISIBLE_DEVICES= python -m pytest"
    lacking = substitute_device.missing()
    if lacking is not None:
        return lacking
    try:
        substitute_device.register()
    except Exception as error:  # of the tests that need the device, not of the whole run
        return error
    return None


@pytest.fixture(scope="session")
def substitute_module():
    problem = _register_substitute()
    if isinstance(problem, Exception):
        raise problem
    if problem is not None:
        pytest.skip(f"the substitute device needs {problem}")
    return substitute_device


@pytest.fixture
def substitute(substitute_module):
    return torch.device("substitute:0")


@pytest.fixture(params=["substitute", "cuda"])
def device(request):
    """Every device beside the CPU; one that is not there is skipped."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def no_waits(device, request):
    """A context in which the host may neither wait for the device nor copy to or from it."""
    if device.type == "cuda":
        return _no_synchronization
    module = request.getfixturevalue("substitute_module")

    @contextmanager
    def context():
        with module.counting() as counts:
            yield
        assert not counts.waits
        assert not counts.copies
        assert counts.launches

    return context


@contextmanager
def _no_synchronization():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
