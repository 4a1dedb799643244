"""Processes with a device each measure together: by gloo on the substitute, by nccl on CUDA."""

import pytest
import torch
import torch.distributed as dist

import peers
import peers_on_devices
import processes

BACKENDS = {"substitute": "gloo", "cuda": "nccl"}


@pytest.fixture(scope="module", params=BACKENDS)
def said(request, tmp_path_factory):
    """What each of two processes said of every scenario; they run once for all tests."""
    kind, backend = request.param, BACKENDS[request.param]
    if kind == "substitute":
        request.getfixturevalue("substitute_module")
    elif torch.cuda.device_count() < 2 or not dist.is_nccl_available():
        pytest.skip("needs two CUDA devices and nccl")
    folder = tmp_path_factory.mktemp("peers")
    processes.together(peers_on_devices.run, 2, 2, folder, kind, backend)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("scenario", peers_on_devices.SCENARIOS)
def test_together(said, scenario):
    peers.assert_all_said_the_same([process[scenario] for process in said])
