"""Every recipe runs as it stands, the distributed ones in two processes."""

import os
import runpy
import socket
import traceback
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

FOLDER = Path(__file__).parent / "recipes"
DISTRIBUTED = ("ddp", "distributed_sampler", "fsdp2")
NEEDS = {
    "huggingface_trainer": "accelerate",
    "lightning_trainer": "lightning.pytorch",
    "timm_model": "timm",
}
ALONE = sorted({path.stem for path in FOLDER.glob("*.py")} - {*DISTRIBUTED})


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")  # Lightning's
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("name", ALONE)
def test_a_recipe_runs(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each of two processes said of each recipe; None where it ran."""
    folder = tmp_path_factory.mktemp("recipes")
    sockets = [socket.socket() for _ in DISTRIBUTED]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    multiprocessing.spawn(_run_distributed, (ports, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_a_distributed_recipe_runs_in_two_processes(said, name):
    for process in said:
        assert process[name] is None, process[name]


def _run_distributed(rank, ports, folder):
    """Do as torchrun does, once for all recipes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    said = {}
    for name, port in zip(DISTRIBUTED, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        except BaseException:
            said[name] = traceback.format_exc()
        else:
            said[name] = None
    torch.save(said, folder / f"{rank}.pt")
