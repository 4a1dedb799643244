"""Every recipe runs as it stands, the distributed ones in two processes."""

import runpy
import traceback
from pathlib import Path

import pytest
import torch

import processes
from versions import SHARDS_ON_CPU

FOLDER = Path(__file__).parent / "recipes"
DISTRIBUTED = ("ddp", "distributed_sampler", "fsdp2")
NEEDS = {
    "huggingface_trainer": "accelerate",
    "lightning_trainer": "lightning.pytorch",
    "schedule_free": "schedulefree",
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
    for name in DISTRIBUTED:
        processes.together(_run_distributed, 2, name, folder)
    return {path.stem: torch.load(path) for path in folder.iterdir()}


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_a_distributed_recipe_runs_in_two_processes(said, name):
    if name == "fsdp2" and not SHARDS_ON_CPU:
        pytest.skip("this torch shards on accelerators only")
    for rank in range(2):
        failure = said[f"{name}-{rank}"]
        assert failure is None, failure


def _run_distributed(rank, name, folder):
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    except BaseException:
        failure = traceback.format_exc()
    else:
        failure = None
    torch.save(failure, folder / f"{name}-{rank}.pt")
