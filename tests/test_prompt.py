"""How a Python prompt and a notebook show values: briefly, for models of any size."""

import copy
import html
import html.parser
import pickle
import re

import pytest
import torch
from torch import nn

import bnstats


def deep(layers=60, channels=2048):
    return nn.Sequential(*(nn.BatchNorm1d(channels) for _ in range(layers)))


@pytest.fixture(scope="module")
def values():
    """Every public value, of a model of 60 layers with 2048 channels each."""
    torch.manual_seed(0)
    model = deep()
    batches = list(torch.randn(3, 4, 2048) * 2 + 1)
    with bnstats.record_batch_stats(model) as record, bnstats.observe(model) as seen:
        model(batches[0])
    result = bnstats.recompute_population_stats(model, batches)
    error = bnstats.estimate_running_error(result.after)
    return {
        "Diagnosis": bnstats.diagnose(model, batches),
        "Recalibration": result,
        "PopulationStats": result.after,
        "LayerStats": result.after["0"],
        "DriftReport": result.after.drift_from(model),
        "drift": result.drift,
        "Drift": result.drift["0"],
        "before": result.before,
        "RunningStats": result.before["0"],
        "BatchStatsRecord": record,
        "LayerRecord": record["0"],
        "Observation": seen,
        "errors": error,
        "RunningError": error["0"],
        "Moments": bnstats.Moments.from_batch(batches[0]),
    }


def test_no_public_value_shows_more_than_a_screen(values):
    for name, value in values.items():
        shown = repr(value)
        assert len(shown.splitlines()) <= 60, name
        assert len(shown) < 60 * 240, name
        assert "tensor(" not in shown, name
        if name != "Observation":  # it holds a lock
            assert repr(copy.copy(value)) == shown, name


def test_an_observation_tells_how_much_it_has_seen(values):
    assert repr(values["Observation"]) == "Observation(1 forward of 60 layers)"


def test_every_public_value_is_among_them(values):
    kinds = {type(value).__name__ for value in values.values()}
    public = [getattr(bnstats, name) for name in bnstats.__all__]
    classes = [x for x in public if isinstance(x, type)]
    neither = (nn.Module, Exception)
    assert {x.__name__ for x in classes if not issubclass(x, neither)} <= kinds


def test_what_is_shortened_says_so_and_print_shows_all(values):
    for name in ("Recalibration", "PopulationStats", "DriftReport"):
        assert repr(values[name]).endswith("... 20 more layers; print() shows all"), name
        lines = str(values[name]).splitlines()
        assert {line.split()[0] for line in lines[-60:]} == {str(i) for i in range(60)}, name


def test_a_few_channels_are_shown_in_full_and_many_by_their_range():
    assert repr(bnstats.Moments.from_batch(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))) == (
        "Moments(count=2, mean=[1.5, 3], m2=[0.5, 2])"
    )
    many = bnstats.Moments(2, torch.arange(100.0), torch.full((100,), torch.nan))
    assert repr(many) == ("Moments(count=2, mean=<0 to 99, 100 values>, m2=<100 NaN, 100 values>)")
    some = bnstats.RunningStats(torch.tensor([torch.nan] + [1.0] * 9), torch.ones(2, device="meta"))
    assert repr(some) == ("RunningStats(mean=<1, 1 NaN, 10 values>, var=meta tensor of shape (2,))")
    assert repr(bnstats.Moments(torch.tensor([1, 2]), torch.ones(2), torch.ones(2))) == (
        "Moments(count=[1, 2], mean=[1, 1], m2=[1, 1])"
    )


def test_one_layer_of_one_channel_reads_as_one():
    model = nn.Sequential(nn.BatchNorm1d(1))
    batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[torch.nan], [1.0]])]
    result = bnstats.recompute_population_stats(model, batches, on_nonfinite="skip")
    assert str(result).startswith(
        "1 BatchNorm layer recalibrated, method 'pooled', 1 batch with non-finite statistics "
        "skipped\n"
    )
    assert str(result.after).splitlines()[-1].split() == ["0", "1", "2", "1", "2", "2"]
    assert str(result.drift).startswith("1 BatchNorm layer, running")
    assert repr(result.after["0"]) == (
        "LayerStats(count=2, num_batches=1, mean=[2], var=[2], mean_stderr=[nan], "
        "var_stderr=[nan], correction=1, eps=1e-05, num_samples=0, mean_weight=1, var_weight=1)"
    )
    with bnstats.observe(model) as seen:
        model(batches[0])
    assert repr(seen) == "Observation(1 forward of 1 layer)"
    with bnstats.record_batch_stats(model) as record:
        model(batches[0])
    assert repr(record).startswith("BatchStatsRecord of 1 layer\n")
    (error,) = bnstats.estimate_running_error(result.after).values()
    assert "effective_batches=19, " in repr(error)


class Tags(html.parser.HTMLParser):
    """Checks that tags are closed, and keeps the cells of the body's rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag == "br":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.rows and self.rows[-1] and "tr" in self.open:
            self.rows[-1][-1] += data.strip()


def test_notebooks_show_tables_with_the_worst_layer_first_and_bars(values):
    for name in ("Recalibration", "DriftReport"):
        text = values[name]._repr_html_()
        titles, *rows = Tags(text).rows
        assert titles[:2] == ["layer", "channels"]
        assert [row[0] for row in rows] == values[name].worst_first()[:40]
        assert text.count("linear-gradient") == 2 * 40
        assert "... 20 more layers" in text
    titles, *rows = Tags(values["PopulationStats"]._repr_html_()).rows
    assert [row[0] for row in rows] == [str(i) for i in range(40)]


def test_bars_are_as_long_as_shifts_and_reach_from_1_to_the_ratios():
    model = nn.ModuleDict({"<near>": nn.BatchNorm1d(1), "far": nn.BatchNorm1d(1)})
    stats = bnstats.measure_population_stats(
        model,
        [torch.tensor([[-1.0], [1.0]])],
        forward=lambda model, x: [layer(x) for layer in model.values()],
        correction=0,
    )
    model["far"].running_mean.fill_(4.0)
    model["<near>"].running_mean.fill_(-1.0)
    model["<near>"].running_var.fill_(4.0)
    model["far"].running_var.fill_(1 / 16)
    text = stats.drift_from(model)._repr_html_()
    assert [row[0] for row in Tags(text).rows[1:]] == ["far", "<near>"]  # escaped: no tag
    bars = re.findall(r"transparent (\d+)%, #b2182b \d+% (\d+)%", text)
    assert bars == [("0", "100"), ("0", "50"), ("0", "25"), ("50", "75")]


def test_a_layer_that_is_not_finite_comes_first_and_is_drawn_in_full():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    stats = bnstats.measure_population_stats(model, [torch.randn(8, 2)])
    model[1].running_mean.fill_(torch.nan)
    model[1].running_var.fill_(torch.nan)
    report = stats.drift_from(model)
    assert report.worst_first() == ["1", "0"]
    assert [row[0] for row in Tags(report._repr_html_()).rows[1:]] == ["1", "0"]
    assert "nan" in repr(report)


@pytest.mark.parametrize("name", ["Recalibration", "PopulationStats", "DriftReport"])
def test_results_without_layers_are_shown_too(name):
    with pytest.warns(bnstats.BnstatsWarning, match="no BatchNorm layer"):
        result = bnstats.recompute_population_stats(nn.Linear(2, 2), [torch.ones(2, 2)])
    value = {"Recalibration": result, "PopulationStats": result.after, "DriftReport": result.drift}
    assert "0 BatchNorm layers" in repr(value[name])
    assert str(value[name]) == repr(value[name])
    assert Tags(value[name]._repr_html_()).rows[1:] == []


def test_a_report_of_drift_is_a_dict_that_prints_its_table(values):
    report = values["DriftReport"]
    assert isinstance(report, dict)
    assert [*report] == [str(i) for i in range(60)]
    assert isinstance(report["3"], bnstats.Drift)
    assert "running against population statistics" in str(report)
    assert str(values["drift"]).splitlines()[2:] == str(values["Recalibration"]).splitlines()[2:]
    for twin in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert str(twin) == str(report)
