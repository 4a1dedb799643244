"""The command line as its user meets it."""

import subprocess
import sys

import pytest

from bnstats.cli import main


def test_the_demo_tells_its_story_saves_a_figure_and_repeats_itself(tmp_path, capsys):
    pytest.importorskip("sklearn")
    stories = []
    for name in ("a.png", "b.png"):
        assert main(["demo", "--epochs", "1", "--output", str(tmp_path / name)]) == 0
        out, err = capsys.readouterr()
        assert "1: convolutional net: 100%" in err
        assert "2: moving averages, 2: 100%" in err
        stories.append(out.replace(name, ""))
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert stories[0] == stories[1]
    for word in (
        "bn1",
        "bn2",
        "bn3",
        "mean shift, sd",
        "var ratio",
        "held-out digits",
        "batch norm, 2",
    ):
        assert word in stories[0]


def test_another_seed_is_another_story(tmp_path, capsys):
    pytest.importorskip("sklearn")
    stories = set()
    for seed in "01":
        main(["demo", "--epochs", "1", "--seed", seed, "--output", str(tmp_path / "x.png")])
        stories.add(capsys.readouterr().out)
    assert len(stories) == 2


@pytest.mark.parametrize("missing", ["sklearn.datasets", "matplotlib.figure"])
def test_a_missing_extra_is_named_with_the_remedy(missing, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "bnstats.cli.figure", raising=False)
    assert main(["demo", "--output", str(tmp_path / "x.png")]) == 1
    assert "pip install 'bnstats[demo]'" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_said_before_training(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "missing" / "x.png")]) == 1
    out, err = capsys.readouterr()
    assert "missing" in err
    assert "convolutional" not in err + out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epochs", "0"], "--epochs: expected 1 or more, got 0"),
        (["--seed", str(10**30)], "--seed: expected 0 to"),
        (["--output", "figure.xyz"], "--output: expected a figure's file name"),
        (["--output", "figure"], "--output: expected a figure's file name"),
    ],
)
def test_what_the_demo_cannot_do_is_said_before_training(arguments, says, capsys):
    assert main(["demo", *arguments]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["demo", "--seed", "x"]])
def test_wrong_usage_exits_with_two_and_says_how(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: bnstats" in capsys.readouterr().err


def test_it_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "bnstats", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in run.stdout


def test_importing_bnstats_brings_no_optional_dependency():
    code = "import sys, bnstats; print(*{m.split('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert not loaded & {"matplotlib", "sklearn", "torchvision", "fvcore", "hypothesis", "pytest"}
