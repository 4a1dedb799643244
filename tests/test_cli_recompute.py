"""Checkpoints in, checkpoints out: nothing lost, nothing half written, nothing run."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

import bnstats
from bnstats.cli import main

MODULE = """
import torch
from torch import nn
import torch.distributed as dist

def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))

def other():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))

def loader():
    data = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(2)) + 1
    if dist.is_initialized():
        data = data[dist.get_rank() :: dist.get_world_size()]
    return list(data)

def few_others():
    return [torch.randn(4, 3, generator=torch.Generator().manual_seed(3)) * 2 + 2]

def one_batch():
    return torch.zeros(4, 3)

def sized(size, *, width=4):
    return nn.Linear(size, width)

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.backbone = nn.Sequential(self.stem, nn.ReLU(), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.backbone(x)

def no_model():
    return "a model"

number = 5
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "job", raising=False)
    return tmp_path


def job():
    import job as module

    return module


def save(path="in.pt", wrap=lambda state: state):
    sys.path.insert(0, os.getcwd())
    state = job().model().state_dict()
    torch.save(wrap(state), path)
    return state


def recompute(*arguments, model="job:model", loader="job:loader"):
    return main(
        ["recompute", model, loader, "--checkpoint", "in.pt", "--output", "out.pt", *arguments]
    )


@pytest.mark.parametrize("method", ["pooled", "layerwise", "sweeps"])
def test_the_output_has_the_population_statistics_and_all_else_as_it_was(here, capsys, method):
    state = save(wrap=lambda state: {"epoch": 7, "state_dict": state, "optimizer": {"lr": [0.1]}})
    assert recompute("--method", method, "--device", "cpu", "--stats", "stats.npz") == 0
    out, err = capsys.readouterr()
    assert "2 BatchNorm layers recalibrated" in out
    assert "written to out.pt" in out
    assert "batch-norm statistics" in err or "layers complete" in err
    written = torch.load("out.pt", weights_only=True)
    assert (written["epoch"], written["optimizer"]) == (7, {"lr": [0.1]})
    expected = bnstats.measure_population_stats(job().model(), job().loader(), method=method)
    for key, value in written["state_dict"].items():
        layer, _, statistic = key.rpartition(".")
        if statistic.startswith("running_"):
            population = getattr(expected[layer], statistic.removeprefix("running_"))
            assert torch.equal(value, population.float())
        else:
            assert torch.equal(value, state[key])
    assert torch.equal(bnstats.PopulationStats.load("stats.npz")["1"].mean, expected["1"].mean)
    assert sorted(p.name for p in here.iterdir() if p.is_file()) == [
        "in.pt", "job.py", "out.pt", "stats.npz",
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.usefixtures("here")
def test_a_layer_of_two_names_is_written_under_both(prefix):
    sys.path.insert(0, os.getcwd())
    model = job().Shared()
    state = model.state_dict()
    torch.save({f"{prefix}{key}": value.clone() for key, value in state.items()}, "in.pt")
    assert recompute("--no-progress", model="job:Shared") == 0
    bnstats.recompute_population_stats(model, job().loader())
    written = torch.load("out.pt")
    assert written.keys() == {f"{prefix}{key}" for key in state}
    for key, value in model.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(written[f"{prefix}{key}"], value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    ],
    ids=["bare", "under model", "from DDP", "from compile in DDP"],
)
@pytest.mark.usefixtures("here")
def test_checkpoints_come_in_many_forms_and_keep_them(wrap):
    save(wrap=wrap)
    assert recompute("--no-progress") == 0
    before, after = torch.load("in.pt"), torch.load("out.pt")
    assert before.keys() == after.keys()
    if "model" in before:
        assert before["model"].keys() == after["model"].keys()


@pytest.mark.usefixtures("here")
def test_a_prior_that_was_measured_draws_few_samples_toward_it(capsys):
    save()
    of_source = ["measure", "job:model", "job:loader", "--checkpoint", "in.pt", "--no-progress"]
    assert main([*of_source, "--output", "source.npz"]) == 0
    options = ["--prior", "source.npz", "--stats", "few.npz", "--no-progress"]
    assert recompute(*options, loader="job:few_others") == 0
    assert "weights of the loader's own statistics" in capsys.readouterr().out
    source = bnstats.PopulationStats.load("source.npz")
    expected = bnstats.measure_population_stats(job().model(), job().few_others(), prior=source)
    written, kept = torch.load("out.pt"), bnstats.PopulationStats.load("few.npz")
    assert kept.method == "layerwise"
    assert 0 < expected["1"].mean_weight < 1
    for name, layer in expected.items():
        assert torch.equal(written[f"{name}.running_mean"], layer.mean.float())
        assert torch.equal(written[f"{name}.running_var"], layer.var.float())
        assert kept[name].mean_weight == layer.mean_weight


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["recompute", "measure"])
def test_a_prior_that_does_not_serve_is_refused_with_the_remedy(capsys, command):
    save()
    recompute("--stats", "without.npz", "--output", "other.pt", "--no-progress")
    options = ["--checkpoint", "in.pt", "--output", "out.file", "--no-progress"]
    for prior, says in (
        ("without.npz", "measure_population_stats(model, train_loader)"),
        ("gone.npz", "gone.npz"),
        ("in.pt", "in.pt: expected"),
    ):
        capsys.readouterr()
        assert main([command, "job:model", "job:few_others", *options, "--prior", prior]) == 2
        assert says in capsys.readouterr().err
        assert not os.path.exists("out.file")


@pytest.mark.usefixtures("here")
def test_options_reach_the_measurement(capsys):
    save()
    assert recompute("--max-batches", "2", "--stats", "a.npz", "--no-progress") == 0
    assert capsys.readouterr().err == ""
    assert bnstats.PopulationStats.load("a.npz")["1"].num_batches == 2
    assert recompute("--tolerance", "-1", "--overwrite") == 2
    assert "tolerance: expected a positive number" in capsys.readouterr().err
    assert recompute("--memory-limit", "5", "--method", "layerwise", "--overwrite") == 2
    assert "more than memory_limit=5" in capsys.readouterr().err


def test_no_file_is_replaced_by_accident(here, capsys):
    save()
    before = (here / "in.pt").read_bytes()
    (here / "out.pt").write_text("dear to me")
    assert recompute() == 2
    assert "out.pt is there already; pass --overwrite" in capsys.readouterr().err
    assert main(
        ["recompute", "job:model", "job:loader", "--checkpoint", "in.pt", "--output", "in.pt"]
    )
    assert (here / "in.pt").read_bytes() == before
    assert (here / "out.pt").read_text() == "dear to me"
    assert recompute("--overwrite") == 0


def test_outputs_that_are_links_are_written_through(here):
    save()
    (here / "store").mkdir()
    for name in ("out.pt", "stats.npz"):
        (here / "store" / name).write_text("before")
        (here / name).symlink_to(f"store/{name}")
    assert recompute("--overwrite", "--stats", "stats.npz", "--no-progress") == 0
    assert (here / "out.pt").is_symlink()
    assert (here / "stats.npz").is_symlink()
    assert "1.running_mean" in torch.load(here / "store" / "out.pt")
    assert "1" in bnstats.PopulationStats.load(here / "store" / "stats.npz")
    assert sorted(os.listdir(here / "store")) == ["out.pt", "stats.npz"]


def test_a_write_that_fails_leaves_nothing_half_done(here, monkeypatch):
    save()
    (here / "out.pt").write_text("whole")

    def fail(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    assert recompute("--overwrite") == 2
    assert (here / "out.pt").read_text() == "whole"
    assert sorted(path.name for path in here.glob("*.p*")) == ["in.pt", "job.py", "out.pt"]


def test_a_checkpoint_runs_no_code(here, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {here}/owned",)

    save()
    with open("in.pt", "wb") as file:
        pickle.dump({"state_dict": Evil()}, file, protocol=2)
    assert recompute() == 2
    assert "in.pt: expected a checkpoint" in capsys.readouterr().err
    assert not (here / "owned").exists()


@pytest.mark.parametrize(
    ("options", "content", "says"),
    [
        ({"model": "job"}, None, "expected module:callable, got 'job'"),
        ({"model": "job:missing"}, None, "has no 'missing'"),
        ({"model": "job:number"}, None, "has 'number' of type int"),
        ({"model": "nowhere:model"}, None, "MODEL: there is no module 'nowhere', looked for in"),
        (
            {"model": "job:no_model"},
            None,
            "expected job:no_model to return a torch.nn.Module, got str",
        ),
        ({"model": "job:other"}, None, "in.pt is not of the model job:other"),
        ({"loader": "job:one_batch"}, None, "expected an iterable of batches"),
        ({}, b"no checkpoint at all", "in.pt: expected a checkpoint"),
        ({}, b"", "in.pt: expected a checkpoint"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_written(here, capsys, options, content, says):
    save()
    if content is not None:
        (here / "in.pt").write_bytes(content)
    assert recompute(**options) == 2
    assert says in capsys.readouterr().err
    assert not (here / "out.pt").exists()


def test_a_truncated_checkpoint_and_one_without_tensors_are_named(here, capsys):
    save()
    whole = (here / "in.pt").read_bytes()
    (here / "in.pt").write_bytes(whole[: len(whole) // 2])
    assert recompute() == 2
    torch.save({"epoch": 3}, "in.pt")
    assert recompute() == 2
    err = capsys.readouterr().err
    assert "in.pt: expected a checkpoint" in err
    assert "expected a state dict bare or under one of 'state_dict', " in err
    assert "got a dict without one, with the keys 'epoch'" in err


@pytest.mark.usefixtures("here")
def test_a_missing_file_or_folder_is_named(capsys):
    assert recompute() == 2
    assert "in.pt" in capsys.readouterr().err
    save()
    assert recompute("--stats", "missing/stats.npz") == 2
    assert "there is no folder missing" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no file")
@pytest.mark.usefixtures("here")
def test_a_folder_that_takes_no_file_is_refused_before_the_data_are_read(capsys):
    save()
    for option in ("--output", "--stats"):
        arguments = ["--checkpoint", "in.pt", "--output", "out.pt", option, "/proc/out.pt"]
        assert main(["recompute", "job:model", "job:loader", *arguments]) == 2
        err = capsys.readouterr().err
        assert "to write out.pt into: '/proc'" in err
        assert err.count("\n") == 1  # no bar of progress
        assert not os.path.exists("out.pt")


@pytest.mark.usefixtures("here")
def test_a_callable_that_needs_arguments_is_named_with_them(capsys):
    save()
    assert recompute(model="job:sized") == 2
    err = capsys.readouterr().err
    assert "MODEL: expected a callable that is called with (), got job:sized(size" in err
    assert "missing a required argument: 'size'" in err
    files = ["job:model", "job:loader", "--checkpoint", "in.pt"]
    assert main(["diagnose", *files, "--metric", "job:sized"]) == 2
    err = capsys.readouterr().err
    assert "METRIC: expected a callable that is called with (model, batch), got job:sized" in err


@pytest.mark.usefixtures("here")
def test_compare_shows_how_far_a_checkpoint_or_another_file_is(capsys):
    save()
    recompute("--stats", "stats.npz", "--no-progress")
    capsys.readouterr()
    assert main(["compare", "in.pt", "stats.npz"]) == 0
    far = capsys.readouterr().out
    assert "in.pt against stats.npz" in far
    assert main(["compare", "out.pt", "stats.npz"]) == 0
    assert " 0.000    0.000    1.000   1.000" in capsys.readouterr().out
    assert main(["compare", "stats.npz", "stats.npz"]) == 0
    assert " 0.000    0.000    1.000   1.000" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_compare_names_the_layers_that_differ(capsys):
    save()
    recompute("--stats", "stats.npz", "--no-progress")
    stats = bnstats.PopulationStats.load("stats.npz")
    bnstats.PopulationStats({"1": stats["1"]}).save("fewer.npz")
    bnstats.PopulationStats({"1": stats["1"], "9": stats["3"]}).save("others.npz")
    torch.save(job().other().state_dict(), "narrow.pt")
    for arguments, says in (
        (["fewer.npz", "stats.npz"], "not the same layers: '3' in stats.npz alone"),
        (["stats.npz", "fewer.npz"], "not the same layers: '3' in stats.npz alone"),
        (["in.pt", "others.npz"], "'3' in in.pt alone; '9' in others.npz alone"),
        (["narrow.pt", "fewer.npz"], "layer '1' has 5 channels in narrow.pt and 4 in fewer.npz"),
        (["in.pt", "gone.npz"], "gone.npz"),
    ):
        assert main(["compare", *arguments]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_compare_names_a_damaged_file(here, capsys):
    save()
    recompute("--stats", "stats.npz", "--no-progress")
    whole = (here / "stats.npz").read_bytes()
    for content in (whole[:-100], whole[:500], whole[:-20] + bytes(20)):
        (here / "cut.npz").write_bytes(content)
        capsys.readouterr()
        assert main(["compare", "cut.npz", "stats.npz"]) == 2
        assert "cut.npz: expected" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_torchrun_measures_together_and_one_process_writes():
    save()
    recompute("--stats", "alone.npz", "--no-progress")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "bnstats", "recompute", "job:model", "job:loader", "--no-progress"]
    command += ["--checkpoint", "in.pt", "--output", "two.pt", "--stats", "two.npz"]
    one_each = {} if torch.cuda.device_count() > 1 else {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command[:3], "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint",
         "127.0.0.1:0", *command[3:]],
        capture_output=True, text=True, check=False,
        env={**os.environ, **one_each, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("BatchNorm layers recalibrated") == 1
    together = bnstats.PopulationStats.load("two.npz")
    alone = bnstats.PopulationStats.load("alone.npz")
    for name in alone:
        assert together[name].count == alone[name].count
        torch.testing.assert_close(together[name].var, alone[name].var, rtol=1e-5, atol=0)
