"""Checkpoints as they come: of wrappers, averages and trainers; broken ones; mistyped names."""

import argparse
import os
import random
import re
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import bnstats
import trainers
from bnstats.cli import _COMMANDS, main

MODULE = """
import torch
import trainers
from torch import nn

model = trainers.network

def loader():
    return trainers.loader(shuffle=False)

def two():
    return nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm1d(4)})

def other():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))

value = 5
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("job", "nested", "missing_import"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def trained():
    """A network whose running statistics are a bit off."""
    model = trainers.network()
    for x, _ in trainers.loader():
        model(x)
    return model


def run(command, *arguments):
    options = ["--no-progress"] if command in ("recompute", "measure") else []
    return main([command, *map(str, arguments), *options])


def recompute(*arguments, model="job:model", loader="job:loader"):
    return run(
        "recompute", model, loader, "--checkpoint", "in.pt", "--output", "out.pt", *arguments
    )


def averaged(model):
    average = AveragedModel(model)
    average.update_parameters(model)
    return average.state_dict()


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


# What is saved of a model, and where in it the running mean of its first layer is then.
FORMS = {
    "AveragedModel": (lambda m: averaged(m), "module.1.running_mean"),
    "model_state_dict": (
        lambda m: {"epoch": 3, "model_state_dict": m.state_dict(), "loss": 0.5},
        ("model_state_dict", "1.running_mean"),
    ),
    "Lightning": (
        lambda m: {
            "state_dict": {**prefixed("model.", m.state_dict()), "loss.weight": torch.ones(3)},
            "pytorch-lightning_version": "2.6", "optimizer_states": [{"state": {}}],
        },
        ("state_dict", "model.1.running_mean"),
    ),
    "Lightning, compiled": (
        lambda m: {"state_dict": prefixed("net._orig_mod.", m.state_dict())},
        ("state_dict", "net._orig_mod.1.running_mean"),
    ),
    "timm, average alone": (
        lambda m: {"arch": "resnet", "state_dict_ema": m.state_dict()},
        ("state_dict_ema", "1.running_mean"),
    ),
    "without counters": (
        lambda m: {k: v for k, v in m.state_dict().items() if "tracked" not in k},
        "1.running_mean",
    ),
}  # fmt: skip


def tensor_of(content, where):
    for key in [where] if isinstance(where, str) else where:
        content = content[key]
    return content


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_is_taken_as_it_comes_and_keeps_its_form(form, capsys):
    wrap, where = FORMS[form]
    model = trained()
    torch.save(wrap(model), "in.pt")
    assert recompute() == 0
    expected = bnstats.measure_population_stats(model, trainers.loader(shuffle=False))
    before, after = torch.load("in.pt"), torch.load("out.pt")
    assert torch.equal(tensor_of(after, where), expected["1"].mean.float())
    changed = _changed(before, after)
    assert all("running_" in key for key in changed)
    assert len(changed) == 4
    assert run("check", "out.pt") == 0


def _changed(before, after, path=""):
    assert type(before) is type(after)
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        return [x for key in before for x in _changed(before[key], after[key], f"{path}/{key}")]
    same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    return [] if same else [path]


def test_of_several_state_dicts_the_trained_one_is_taken_unless_another_is_asked_for(capsys):
    model, average = trained(), trainers.network()
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}, "in.pt")
    assert recompute() == 0
    assert "as they were: 'state_dict_ema'" in capsys.readouterr().out
    after = torch.load("out.pt")
    assert not torch.equal(after["state_dict"]["1.running_mean"], model[1].running_mean)
    assert torch.equal(after["state_dict_ema"]["1.running_mean"], average[1].running_mean)
    assert recompute("--key", "state_dict_ema", "--overwrite") == 0
    after = torch.load("out.pt")
    assert torch.equal(after["state_dict"]["1.running_mean"], model[1].running_mean)
    assert not torch.equal(after["state_dict_ema"]["1.running_mean"], average[1].running_mean)
    assert run("compare", "in.pt", "in.pt", "--other-key", "state_dict_ema") == 0
    assert re.search(r"\n1 .* [1-9]", capsys.readouterr().out)


def test_nested_keys_are_joined_by_dots(capsys):
    torch.save({"ema": {"decay": 0.9, "weights": trained().state_dict()}}, "in.pt")
    assert recompute() == 2
    assert "state dicts under 'ema.weights': pass one of them as --key" in capsys.readouterr().err
    assert recompute("--key", "ema.weights") == 0


def test_names_that_fit_twice_are_asked_about(capsys):
    model = trained()
    torch.save(
        {**prefixed("student.", model.state_dict()), **prefixed("teacher.", model.state_dict())},
        "in.pt",
    )
    assert recompute() == 2
    assert "--strip-prefix with one of 'student.', 'teacher.'" in capsys.readouterr().err
    for prefix in ("teacher", "teacher."):
        assert recompute("--strip-prefix", prefix, "--overwrite") == 0
        after = torch.load("out.pt")
        assert torch.equal(after["student.1.running_mean"], model[1].running_mean)
        assert not torch.equal(after["teacher.1.running_mean"], model[1].running_mean)


def test_what_does_not_fit_shows_three_keys_and_what_to_pass(capsys):
    torch.save({"state_dict": two().state_dict(), "ema": trained().state_dict()}, "in.pt")
    assert recompute() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "in.pt (key 'state_dict') lacks '0.weight', '0.bias', '1.weight' and" in err
    assert "it has 'a.weight', 'a.bias', 'a.running_mean' and" in err
    assert "--strip-prefix" in err
    assert "--key for one of 'ema'" in err
    assert recompute("--key", "ema") == 0
    assert recompute("--key", "model_ema", "--overwrite") == 2
    assert "expected a state dict under 'model_ema', got state dicts under 'state_dict', 'ema'" in (
        capsys.readouterr().err
    )


def two():
    return nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm1d(4)})


@pytest.mark.parametrize("command", ["recompute", "measure"])
@pytest.mark.parametrize("link", [False, True])
def test_two_options_that_name_one_file_are_refused_before_any_work(here, capsys, command, link):
    torch.save(trained().state_dict(), "in.pt")
    whole = (here / "in.pt").read_bytes()
    same = "in.pt"
    if link:
        same = "link.pt"
        (here / same).symlink_to("in.pt")
    clashes = {
        "recompute": [("--output", "out.pt", "--stats", same), ("--output", "x", "--stats", "./x")],
        "measure": [("--output", same)],
    }[command]
    for options in clashes:
        arguments = ("no:model", "no:loader", "--checkpoint", "in.pt", *options, "--overwrite")
        assert run(command, *arguments) == 2
        assert "are the same file" in capsys.readouterr().err
    assert (here / "in.pt").read_bytes() == whole
    assert not (here / "out.pt").exists()
    assert not (here / "x").exists()


@pytest.mark.parametrize("command", ["recompute", "measure"])
@pytest.mark.parametrize("link", [False, True])
def test_the_priors_statistics_are_not_written_over(here, capsys, command, link):
    (here / "source.npz").write_bytes(b"the statistics of the training data")
    same = "source.npz"
    if link:
        same = "link.npz"
        (here / same).symlink_to("source.npz")
    targets = {"recompute": [("--output", "x", "--stats", same), ("--output", same)]}
    for options in targets.get(command, [("--output", same)]):
        arguments = ("no:model", "no:loader", "--checkpoint", "in.pt", *options, "--overwrite")
        assert run(command, *arguments, "--prior", "source.npz") == 2
        err = capsys.readouterr().err
        assert f"bnstats: {options[-2]} and --prior are the same file, {same}" in err
    assert (here / "source.npz").read_bytes() == b"the statistics of the training data"


def test_a_checkpoint_may_be_replaced_by_itself_recalibrated():
    torch.save(trained().state_dict(), "in.pt")
    arguments = ("job:model", "job:loader", "--checkpoint", "in.pt", "--output", "in.pt")
    assert run("recompute", *arguments) == 2
    assert run("recompute", *arguments, "--overwrite") == 0
    expected = bnstats.measure_population_stats(trained(), trainers.loader(shuffle=False))
    assert torch.equal(torch.load("in.pt")["1.running_mean"], expected["1"].mean.float())


@pytest.mark.parametrize(
    ("device", "says"), [("banana", "banana"), ("cuda:77", "cuda:77"), ("meta2", "meta2")]
)
def test_a_device_that_is_not_there_is_one_line_before_any_work(capsys, device, says):
    torch.save(trained().state_dict(), "in.pt")
    assert recompute("--device", device, model="no:model") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bnstats: --device: cannot compute on '{says}'")
    assert err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_loses_nothing(here, capsys):
    torch.save(trained().state_dict(), "in.pt")
    assert recompute("--overwrite", "--stats", "/dev/full") == 2
    err = capsys.readouterr().err
    assert err.startswith("bnstats: ")
    assert "No space left" in err
    assert err.count("\n") == 1
    assert not (here / "out.pt").exists()
    arguments = ("job:model", "job:loader", "--checkpoint", "in.pt", "--output", "/dev/full")
    assert run("recompute", *arguments, "--overwrite") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in here.iterdir() if p.is_file()) == ["in.pt", "job.py"]


def test_statistics_that_a_half_checkpoint_cannot_hold_are_not_written(here, capsys):
    state = trained().state_dict()
    (here / "far.py").write_text(
        "import torch\nfrom job import model\n"
        "def loader(): return [torch.randn(8, 4) * 1e6 for _ in range(3)]\n"
    )
    state["1.running_var"] = state["1.running_var"].half()
    torch.save(state, "in.pt")
    assert recompute(loader="far:loader") == 2
    assert (
        "'1.running_var' is of torch.float16, which cannot hold statistics up to"
        in capsys.readouterr().err
    )
    assert not (here / "out.pt").exists()


MISTYPED = {
    "jib:model": r"MODEL: there is no module 'jib', looked for in \S+; |.*nearest name is 'job'",
    "job:modle": r"module 'job' \(\S+job.py\) has no 'modle'; the nearest name is 'model'",
    "job:value": r"module 'job' \(\S+job.py\) has 'value' of type int",
    "nested.missing:model": r"there is no module 'nested'",
    "missing_import:model": r"importing module 'missing_import' failed: No module named 'nowhere'",
    "job": r"MODEL: expected module:callable, got 'job'",
    "job:": r"MODEL: expected module:callable, got 'job:'",
}


@pytest.mark.parametrize("where", MISTYPED)
def test_a_mistyped_name_says_what_was_looked_for_and_where(here, capsys, where):
    (here / "missing_import.py").write_text("import nowhere\n")
    torch.save(trained().state_dict(), "in.pt")
    assert recompute(model=where) == 2
    err = capsys.readouterr().err
    assert re.search(MISTYPED[where], err), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["recompute", "measure"])
def test_help_imports_no_model(here, capsys, command):
    (here / "effect.py").write_text("open('ran', 'w')\n")
    for model in ("effect:model", "nowhere:model"):
        with pytest.raises(SystemExit) as exit_:
            run(command, model, "effect:loader", "--help")
        assert exit_.value.code == 0
    assert "module:callable that returns the model" in capsys.readouterr().out
    assert not (here / "ran").exists()


@pytest.mark.parametrize("command", _COMMANDS, ids=lambda x: x.__name__.rpartition(".")[2])
def test_every_argument_of_a_command_is_explained(command):
    parser = command.add_parser(argparse.ArgumentParser().add_subparsers())
    assert "`" not in parser.format_help()  # markup is for docstrings
    for action in parser._actions:
        assert action.help, action.dest
        first, *others = action.help.split()
        assert others or first == "help", action.dest
        assert first != "of", action.dest  # of what?


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"bnstats {bnstats.__version__}\n"


@pytest.mark.parametrize("command", ["recompute", "measure", "check", "compare"])
def test_a_damaged_checkpoint_is_one_line_whatever_was_damaged(here, capsys, command):
    wrapped = {"epoch": 1, "state_dict": prefixed("module.", trained().state_dict())}
    torch.save(wrapped, "whole.pt")
    torch.save(wrapped, "old.pt", _use_new_zipfile_serialization=False)
    chance = random.Random(0)
    codes = set()
    for name in ("whole.pt", "old.pt"):
        whole = (here / name).read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(chance.choice([1, 1, 4, 30])):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            if chance.random() < 0.2:
                del damaged[chance.randrange(len(damaged)) :]
            (here / "in.pt").write_bytes(damaged)
            files = {
                "recompute": ["job:model", "job:loader", "--checkpoint", "in.pt", "--output", "o"],
                "measure": ["job:model", "job:loader", "--checkpoint", "in.pt", "--output", "o"],
                "check": ["in.pt"],
                "compare": ["in.pt", "whole.pt"],
            }[command]
            overwrite = ["--overwrite"] if "--output" in files else []
            capsys.readouterr()
            code = run(command, *files, *overwrite)
            err = capsys.readouterr().err
            assert code in (0, 1, 2)
            assert err.count("\n") == (code == 2), err
            assert "trusted source" not in err  # torch's advice on damaged files
            codes.add(code)
    assert {0, 2} <= codes


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("text.pt", b"hello", "a file that is damaged or of another kind"),
        ("empty.pt", b"", r"a file that is damaged or of another kind \(EOFError"),
        ("model.safetensors", b"\x40\0\0\0{}", r"torch.save\(safetensors.torch.load_file\(path\)"),
    ],
)
def test_what_is_no_checkpoint_is_not_advised_to_be_trusted(here, capsys, name, content, says):
    (here / name).write_bytes(content)
    assert run("check", name) == 2
    err = capsys.readouterr().err
    assert re.search(rf"^bnstats: {name}: expected a checkpoint.*, got .*{says}", err), err
    assert "trusted source" not in err
    assert "weights_only` set" not in err


def test_a_state_dict_with_values_of_other_kinds_is_one_line(capsys):
    state = trained().state_dict()
    for key, value in (
        ("1.running_mean", 5),
        ("1.running_mean", torch.ones(2, 3)),
        ("1.running_mean", torch.ones(6, dtype=torch.int64)),
        ("1.running_var", None),
        ("1.running_var", torch.ones(7)),
        ("0.weight", "text"),
        ("0.weight", torch.ones(1)),
        (3, torch.ones(1)),
    ):
        torch.save({**state, key: value}, "in.pt")
        assert recompute() == 2
        checked = run("check", "in.pt")
        assert checked in (0, 2)
        assert capsys.readouterr().err.count("\n") == 1 + (checked == 2)
        assert not os.path.exists("out.pt")
