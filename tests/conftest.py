"""Makes torchvision importable beside a CPU build of torch, and names what a test needs."""

import sys

import pytest
import torch


def _import_torchvision():
    try:
        import torchvision  # noqa: F401  its import is what is tried
    except RuntimeError:
        # Its wheel is built against CUDA: its import asks for two operators of its own library,
        # which does not load beside a CPU torch. The models need neither.
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

        return library
    return None


# Kept for the life of the process: the schemas go when the library does.
_LIBRARY = _import_torchvision()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
