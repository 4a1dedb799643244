"""Checkpoints that trainers wrote, with all that they keep; what could run code; ends of pipes."""

import argparse
import errno
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
import trainers
from bnstats.cli import main

MODULE = """
import trainers

model = trainers.network

def loader():
    return trainers.loader(shuffle=False)

def breaking():
    yield from loader()
    raise BrokenPipeError(32, "a worker of the loader's has ended")
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "job", raising=False)
    return tmp_path


def recompute(checkpoint="in.pt", output="out.pt", *, loader="job:loader"):
    return main(
        ["recompute", "job:model", loader, "--checkpoint", str(checkpoint), "--output", output,
         "--no-progress", "--overwrite"]
    )  # fmt: skip


def changed(before, after, path=""):
    """Return where two checkpoints differ; every kind of object is of the same kind in both."""
    assert type(before) is type(after), path
    if isinstance(before, argparse.Namespace):
        before, after = vars(before), vars(after)
    if isinstance(before, dict):
        assert [*before] == [*after]
        return [x for key in before for x in changed(before[key], after[key], f"{path}/{key}")]
    if isinstance(before, (list, tuple)):
        assert len(before) == len(after)
        pairs = enumerate(zip(before, after, strict=True))
        return [x for i, (a, b) in pairs for x in changed(a, b, f"{path}/{i}")]
    if isinstance(before, (torch.Tensor, np.ndarray)):
        assert before.dtype == after.dtype
        same = torch.equal(torch.as_tensor(before), torch.as_tensor(after))
    else:
        same = before == after
    return [] if same else [path]


def assert_recalibrated(before, after, key, prefix=""):
    """Four running statistics are those of the data, and nothing else is changed."""
    before, after = (torch.load(path, weights_only=False) for path in (before, after))
    state = after[key] if key else after
    model = trainers.network()
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items()})
    expected = bnstats.measure_population_stats(model, trainers.loader(shuffle=False))
    assert torch.equal(state[f"{prefix}1.running_mean"], expected["1"].mean.float())
    paths = changed(before, after)
    assert sorted(path.removeprefix(f"/{key}/{prefix}") for path in paths) == [
        f"{layer}.running_{what}" for layer in "15" for what in ("mean", "var")
    ]


def test_a_checkpoint_of_timms_saver_is_read_and_kept(here):
    utils = pytest.importorskip("timm.utils")
    model = trainers.network()
    average = utils.ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in trainers.loader():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        average.update(model)
    arguments = argparse.Namespace(model="small", data=pathlib.Path("/data"), mean=(0.5, 0.5))
    saver = utils.CheckpointSaver(
        model, optimizer, arguments, average, checkpoint_dir=str(here), recovery_dir=str(here)
    )
    saver.save_checkpoint(3, metric=np.float64(0.75))
    saved = here / "checkpoint-3.pth.tar"
    assert recompute(saved) == 0
    assert_recalibrated(saved, "out.pt", "state_dict")


# Lightning's own, about torch's internals and about what a tiny training is advised to do.
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_checkpoint_of_lightnings_trainer_is_read_and_kept(here):
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(lightning.LightningModule):
        def __init__(self, folder, lr, sizes):
            super().__init__()
            self.save_hyperparameters()
            self.net = trainers.network()

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=float(self.hparams.lr))

    saving = lightning.callbacks.ModelCheckpoint(here / "saved", "{epoch}", monitor="loss")
    stopping = lightning.callbacks.EarlyStopping("loss", patience=5)
    trainer = trainers.lightning_trainer(here, [saving, stopping], enable_checkpointing=True)
    trainer.fit(Net(here / "data", np.float32(0.1), np.arange(3)), trainers.loader())
    saved = torch.load(saving.best_model_path, weights_only=False)
    assert {"loops", "callbacks", "hyper_parameters", "optimizer_states"} <= saved.keys()
    assert recompute(saving.best_model_path) == 0
    assert_recalibrated(saving.best_model_path, "out.pt", "state_dict", "net.")


BESIDE = [
    argparse.Namespace(a=1, nested=argparse.Namespace(b=pathlib.Path("x/y"))),
    pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:/a"), np.float32(0.5), np.int64(3),
    np.bool_(True), np.float16(2), np.complex64(1j), np.str_("word"), np.arange(6.0).reshape(2, 3),
    np.array(["a", "bc"]), np.zeros((0, 2), dtype=np.uint8),
]  # fmt: skip


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("value", BESIDE, ids=lambda value: type(value).__name__)
def test_what_runs_no_code_is_read_and_kept(value, new):
    content = {"state_dict": trainers.network().state_dict(), "value": [value]}
    torch.save(content, "in.pt", _use_new_zipfile_serialization=new)
    assert recompute() == 0
    (after,) = torch.load("out.pt", weights_only=False)["value"]
    assert type(after) is type(value)
    assert np.array_equal(after, value) if isinstance(value, np.ndarray) else after == value
    with pytest.raises(Exception, match="GLOBAL"):  # elsewhere torch.load is as it was
        torch.load("in.pt", weights_only=True)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_that_another_numpy_wrote_are_read(here, module):
    torch.save(
        {"state_dict": trainers.network().state_dict(), "metric": np.float64(0.5)}, "in.pt",
        _use_new_zipfile_serialization=False,
    )  # fmt: skip
    whole = (here / "in.pt").read_bytes()
    mine = np.float64().__reduce__()[0].__module__.encode()
    assert mine in whole
    (here / "in.pt").write_bytes(whole.replace(mine, module.encode()))
    assert recompute() == 0
    assert torch.load("out.pt", weights_only=False)["metric"] == 0.5


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


class Plain:
    pass


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(), "posix.system"),
        (Plain(), "test_cli_trainers.Plain"),
        (np.array([Plain()], dtype=object), "numpy.dtypes.ObjectDType"),
    ],
    ids=["runs", "plain", "in an array"],
)
def test_any_other_object_is_refused_by_its_name(here, capsys, value, name, new):
    content = {"state_dict": trainers.network().state_dict(), "value": value}
    torch.save(content, "in.pt", _use_new_zipfile_serialization=new)
    assert recompute() == 2
    err = capsys.readouterr().err
    assert f"got an object of {name}, and reading it could run code" in err
    assert err.count("\n") == 1
    assert not (here / "ran").exists()
    assert not (here / "out.pt").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_file(capsys):
    torch.save(trainers.network().state_dict(), "in.pt")
    assert recompute(output="/dev/full") == 2
    err = capsys.readouterr().err
    assert "/dev" in err
    assert "full" in err.replace("/dev/full", "full")


@pytest.mark.parametrize("what", ["stats", "checkpoint"])
def test_so_does_one_that_fills_up_while_it_is_written(here, capsys, monkeypatch, what):
    """Of a write to an open file, the error that Python raises has no name."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stats = bnstats.measure_population_stats(trainers.network(), trainers.loader())
    torch.save(trainers.network().state_dict(), "in.pt")
    monkeypatch.setattr(*((np, "savez") if what == "stats" else (torch, "save")), full)
    if what == "stats":
        with pytest.raises(OSError, match=f"No space left .*statistics.npz.*{here}") as caught:
            stats.save(here / "statistics.npz")
        assert caught.value.errno == errno.ENOSPC
    else:
        assert recompute() == 2
        err = capsys.readouterr().err
        assert "No space left on device, to write out.pt into" in err
        assert err.count("\n") == 1
        assert sorted(p.name for p in here.iterdir() if p.is_file()) == ["in.pt", "job.py"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_ended_ends_the_command_quietly(unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    torch.save(trainers.network().state_dict(), "in.pt")
    command = [sys.executable, "-m", "bnstats", "compare", "in.pt", "in.pt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read().decode() == ""
        assert process.wait() == 141


def test_a_broken_pipe_of_the_loaders_is_told(capsys):
    torch.save(trainers.network().state_dict(), "in.pt")
    assert recompute(loader="job:breaking") == 2
    assert "a worker of the loader's has ended" in capsys.readouterr().err
