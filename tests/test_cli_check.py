"""What a checkpoint says without data; statistics alone; files of any kind side by side."""

import re

import pytest
import torch
from torch import nn

import bnstats
from bnstats.cli import main
from test_cli_checkpoints import here, run, trained, trainers  # noqa: F401 (a fixture)


def check(state, *options):
    torch.save(state, "in.pt")
    return run("check", "in.pt", *options)


def test_a_healthy_checkpoint_has_no_finding(capsys):
    assert check(trained().state_dict()) == 0
    out = capsys.readouterr().out
    assert out == "2 BatchNorm layers in in.pt\n0 of them wrong, 0 with a note\n"


def test_a_layer_that_was_never_updated_is_wrong(capsys):
    assert check(nn.Sequential(nn.BatchNorm1d(3)).state_dict()) == 1
    assert "WRONG  0: never updated: num_batches_tracked is 0" in capsys.readouterr().out
    stats = {"0.running_mean": torch.zeros(3), "0.running_var": torch.ones(3)}
    assert check(stats) == 1
    assert "never updated: every mean is 0 and every variance 1" in capsys.readouterr().out
    # Recalibrated without a training: the counter is 0, and the statistics are right.
    model = nn.Sequential(nn.BatchNorm1d(3))
    bnstats.recompute_population_stats(model, [torch.randn(9, 3)])
    assert check(model.state_dict()) == 0


@pytest.mark.parametrize(
    ("statistic", "value", "code", "says"),
    [
        ("running_var", -0.5, 1, "WRONG  1: negative variance in 1 of 6 channels, down to -0.5"),
        ("running_var", torch.nan, 1, "WRONG  1: NaN or infinity in 1 of 6 channels"),
        ("running_mean", torch.inf, 1, "WRONG  1: NaN or infinity in 1 of 6 channels"),
        ("running_var", 1e-9, 0, "note   1: variance below eps=1e-05 in 1 of 6 channels, down to"),
        ("running_var", 1e5, 0, r"note   1: beyond float16 \(up to 65504\) in 1 of 6 channels"),
        ("running_mean", -1e5, 0, r"note   1: beyond float16 \(up to 65504\) in 1 of 6 channels"),
    ],
)
def test_each_finding_is_named_with_its_layer(capsys, statistic, value, code, says):
    state = trained().state_dict()
    state[f"1.{statistic}"][2] = value
    assert check({"model": state}) == code
    out = capsys.readouterr().out
    assert re.search(says, out), out
    assert "under 'model'" in out
    assert f"{code} of them wrong, {1 - code} with a note" in out


def test_eps_is_the_models(capsys):
    state = trained().state_dict()
    state["1.running_var"].fill_(0.001)
    assert check(state, "--eps", "0.01") == 0
    assert "below eps=0.01 in 6 of 6 channels" in capsys.readouterr().out
    assert check(state) == 0
    assert "0 with a note" in capsys.readouterr().out


def test_a_statistics_file_is_told_from_a_checkpoint_with_the_command_that_takes_it(capsys):
    bnstats.measure_population_stats(trained(), trainers.loader()).save("stats.npz")
    inputs = ["job:model", "job:loader", "--checkpoint", "stats.npz", "--output", "out"]
    for arguments in (["check", "stats.npz"], ["recompute", *inputs], ["measure", *inputs]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert "stats.npz: expected a checkpoint" in err
        assert "got a statistics file, as bnstats measure writes it: bnstats compare" in err
        assert "damaged" not in err


@pytest.mark.parametrize("new", [True, False])
def test_a_checkpoint_is_told_from_a_statistics_file_with_the_command_that_makes_one(capsys, new):
    torch.save(trained().state_dict(), "in.pt", _use_new_zipfile_serialization=new)
    arguments = ["job:model", "job:loader", "--checkpoint", "in.pt", "--output", "out.pt"]
    assert main(["recompute", *arguments, "--prior", "in.pt"]) == 2
    err = capsys.readouterr().err
    assert "in.pt: expected a file that PopulationStats.save wrote" in err
    assert "got a file of torch.save's: bnstats measure" in err


def test_a_file_without_batch_norm_is_an_error(capsys):
    assert check(nn.Linear(2, 2).state_dict()) == 2
    assert "no running statistics of any layer" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", [True, False])
def test_measure_writes_the_statistics_alone(here, capsys, checkpoint):  # noqa: F811
    torch.save({"state_dict": trained().state_dict()}, "in.pt")
    before = (here / "in.pt").read_bytes()
    options = ["--checkpoint", "in.pt"] if checkpoint else []
    assert run("measure", "job:model", "job:loader", "--output", "s.npz", *options) == 0
    out = capsys.readouterr().out
    assert "2 BatchNorm layers measured, method 'pooled'" in out
    assert "mean shift, sd" in out
    expected = bnstats.measure_population_stats(trained(), trainers.loader(shuffle=False))
    stats = bnstats.PopulationStats.load("s.npz")
    assert torch.equal(stats["5"].var, expected["5"].var)
    assert sorted(p.name for p in here.iterdir() if p.is_file()) == ["in.pt", "job.py", "s.npz"]
    assert (here / "in.pt").read_bytes() == before
    assert run("measure", "job:model", "job:loader", "--output", "s.npz") == 2
    assert "pass --overwrite" in capsys.readouterr().err


def test_compare_takes_a_checkpoint_and_a_statistics_file_in_any_combination(capsys):
    plain, trained_ = trainers.network().state_dict(), trained().state_dict()
    torch.save(plain, "plain.pt")
    torch.save({"state_dict": {f"model.{k}": v for k, v in trained_.items()}}, "lightning.ckpt")
    run("measure", "job:model", "job:loader", "--output", "s.npz")
    capsys.readouterr()
    for files in (
        ("plain.pt", "lightning.ckpt"), ("lightning.ckpt", "plain.pt"), ("plain.pt", "s.npz"),
        ("s.npz", "lightning.ckpt"), ("lightning.ckpt", "s.npz"), ("s.npz", "s.npz"),
    ):  # fmt: skip
        assert run("compare", *files) == 0
        out = capsys.readouterr().out
        assert "2 BatchNorm layers: {} against {}".format(*files) in out
        assert "mean shift, sd" in out
        assert ("stderr" in out) == (files[1] == "s.npz")
        assert "nan" not in out


def test_what_compare_prints_of_two_checkpoints_is_their_drift(capsys):
    mine, other = (nn.Sequential(nn.BatchNorm1d(2, eps=1e-5)) for _ in range(2))
    other[0].running_mean.fill_(4)
    other[0].running_var.fill_(4)
    mine[0].running_mean.copy_(torch.tensor([4.0, 8.0]))
    mine[0].running_var.fill_(8)
    torch.save(mine.state_dict(), "a.pt")
    torch.save(other.state_dict(), "b.pt")
    assert main(["compare", "a.pt", "b.pt"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    kl = (torch.tensor(2.0).log() + 0.5 - 1) / 2 + 16 / 8 / 4
    assert row[:5] == ["0", "2", "1.41", "2", "2"]
    assert float(row[6]) == pytest.approx(float(kl), rel=2e-3)


@pytest.fixture
def two_models():
    """Return nothing; leave a student, and a file of it and of a teacher, whose mean is 1."""
    student = trained().state_dict()
    teacher = {key: x + 1 if "mean" in key else x for key, x in student.items()}
    torch.save(student, "one.pt")
    both = {"student.": student, "teacher.": teacher}
    torch.save({p + key: x for p, state in both.items() for key, x in state.items()}, "two.pt")
    torch.save(student | {f"ema.{key}": x for key, x in teacher.items()}, "beside.pt")


@pytest.mark.usefixtures("two_models")
@pytest.mark.parametrize(
    ("files", "option", "prefixes"),
    [
        (("two.pt", "one.pt"), "--strip-prefix", "'student.', 'teacher.'"),
        (("one.pt", "two.pt"), "--other-strip-prefix", "'student.', 'teacher.'"),
        (("beside.pt", "one.pt"), "--strip-prefix", "'', 'ema.'"),
    ],
)
def test_compare_asks_which_of_two_models_is_meant(capsys, files, option, prefixes):
    file, other = files if option == "--strip-prefix" else reversed(files)
    assert main(["compare", *files]) == 2
    asked = f"{file} has the layers of {other} under 2 prefixes: pass {option} with one of"
    assert f"{asked} {prefixes}" in capsys.readouterr().err
    shifts = []
    for prefix in prefixes.split(", "):
        assert main(["compare", *files, option, prefix.strip("'.")]) == 0
        table = capsys.readouterr().out.splitlines()[4:]
        assert [row.split()[0] for row in table] != []
        shifts.append(max(float(row.split()[2]) for row in table))
    assert shifts[0] == 0 < shifts[1]


@pytest.mark.usefixtures("two_models")
def test_a_prefix_that_no_layer_has_is_named(capsys):
    assert main(["compare", "two.pt", "one.pt", "--strip-prefix", "studnt"]) == 2
    expected = "--strip-prefix: two.pt has no layer under 'studnt.', it has 'student.1',"
    assert expected in capsys.readouterr().err
