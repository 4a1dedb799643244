"""Two processes that train together recalibrate together, with each trainer."""

import importlib.util

import pytest
import torch
from torch.utils.data import DataLoader

import bnstats
import processes
import trainer_peers
import trainers

TRAINERS = {"lightning": trainers.lightning_module, "transformers": trainers.Scored}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes left what they trained; they run once for all tests."""
    folder = tmp_path_factory.mktemp("peers")
    processes.together(trainer_peers.run, 2, folder)
    return folder


def assert_recalibrated(state, name):
    model = TRAINERS[name]()
    model.load_state_dict(state)
    loader = DataLoader(trainers.Rows() if name == "transformers" else trainers.dataset(), 10)
    expected = bnstats.measure_population_stats(model, loader)["net.1"]
    mean, var = (state[f"net.1.running_{what}"] for what in ("mean", "var"))
    torch.testing.assert_close(mean, expected.mean.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var, expected.var.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_end_with_the_same_statistics_of_all_of_their_data(name, request):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    folder = request.getfixturevalue("folder")
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in range(2))
    assert first["count"] == second["count"] == 60
    assert_recalibrated(first["state"], name)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


@pytest.mark.parametrize("name", TRAINERS)
def test_so_has_the_checkpoint_that_one_of_them_wrote(name, request):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    folder = request.getfixturevalue("folder")
    if name == "lightning":
        saved = torch.load(folder / "lightning.ckpt", weights_only=True)
        assert_recalibrated(saved["state_dict"], name)
        assert_recalibrated(saved["current_model_state"], name)
    else:
        from safetensors.torch import load_file

        assert_recalibrated(load_file(folder / "checkpoint-6" / "model.safetensors"), name)
