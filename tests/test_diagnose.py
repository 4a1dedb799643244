"""Looking at statistics: the recorded four are those of the definition, and hooks go."""

import contextlib
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
import cases
from bnstats.errors import InvalidTypeError, InvalidValueError

LAYERS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "without affine": lambda: nn.BatchNorm1d(3, affine=False),
    "without running statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "ema": lambda: bnstats.EMABatchNorm1d(3),
    "cumulative": lambda: bnstats.CumulativeBatchNorm1d(3),
}


def network(layer):
    # The activation overwrites the layer's output, as torchvision's ResNets do.
    return nn.Sequential(nn.Linear(4, 3), layer, nn.ReLU(inplace=True), nn.Linear(3, 2))


def loss_of(output):
    return (output.square() + output).mean()


def definition(model, x):
    """The four statistics by autograd, with y as a value of its own, in float64."""
    layer = model[1]
    h = model[0](x)
    mean, var = h.mean(0), h.var(0, correction=0)
    y = ((h - mean) / (var + layer.eps).sqrt()).detach().requires_grad_()
    weight = 1 if layer.weight is None else layer.weight
    bias = 0 if layer.bias is None else layer.bias
    (gradient,) = torch.autograd.grad(loss_of(model[3]((weight * y + bias).relu())), y)
    return [t.detach() for t in (mean, var, gradient.mean(0), (y * gradient).mean(0))]


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_the_four_statistics_are_those_of_the_definition(make):
    model = network(make()).double()
    if model[1].weight is not None:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    data = torch.randn(6, 8, 4, dtype=torch.float64)
    with bnstats.record_batch_stats(model) as record:
        for x in data:
            loss_of(model(x)).backward()
    layer = record["1"]
    expected = [definition(model, x) for x in data]
    for i, name in enumerate(("mean", "var", "g", "psi")):
        got = getattr(layer, name)
        assert got.shape == (6, 3)
        values = torch.stack([row[i] for row in expected])
        np.testing.assert_allclose(got, values, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("renorm_warmup", [3, 1000])
def test_a_moving_average_layers_record_is_of_what_it_normalizes_with(renorm_warmup):
    layer = bnstats.MovingAverageBatchNorm1d(
        3, window=2, warmup=2, renorm_warmup=renorm_warmup, momentum=0.3, dtype=torch.float64
    )
    nn.init.normal_(layer.weight)
    data = torch.randn(6, 4, 3, dtype=torch.float64)
    gradients = torch.randn_like(data)
    running = torch.ones(3, dtype=torch.float64)
    with bnstats.record_batch_stats(nn.Sequential(layer)) as record:
        for x, gradient in zip(data, gradients, strict=True):
            layer(x).backward(gradient)
    for t, (x, gradient) in enumerate(zip(data, gradients, strict=True), start=1):
        chi = data.square().mean(1)
        var = chi[t - 2 : t].mean(0) if t > 2 else chi[t - 1]
        ratio = ((var + layer.eps) / (running + layer.eps)).sqrt().clamp(1 / 5, 5)
        ratio = ratio if t > renorm_warmup else torch.ones(3)
        running = 0.7 * running + 0.3 * var
        y = ratio * x / (var + layer.eps).sqrt()
        row = [getattr(record["0"], name)[t - 1] for name in ("mean", "var", "g", "psi")]
        weighted = layer.weight.detach() * gradient
        expected = [torch.zeros(3), var, weighted.mean(0), (y * weighted).mean(0)]
        for got, value in zip(row, expected, strict=True):
            torch.testing.assert_close(got, value.double(), rtol=1e-9, atol=1e-12)


def renorm(**options):
    options = {"warmup": 0, "ramp": 0, "max_ratio": 1.2, "max_shift": 0.3, **options}
    return bnstats.RenormBatchNorm1d(3, momentum=0.3, dtype=torch.float64, **options)


def moving_average(**options):
    options = {"window": 2, "warmup": 2, "renorm_warmup": 3, **options}
    return bnstats.MovingAverageBatchNorm1d(3, momentum=0.3, dtype=torch.float64, **options)


def still(layer):
    layer.momentum = 0.0
    return contextlib.nullcontext()


STILL = {"held": bnstats.hold_statistics, "momentum 0": still}


@pytest.mark.parametrize("make", [renorm, moving_average])
@pytest.mark.parametrize("calm", [lambda _: contextlib.nullcontext(), *STILL.values()])
def test_the_record_is_of_what_normalized_also_where_nothing_moves(make, calm):
    layer = make()
    for x in torch.randn(5, 8, 3, dtype=torch.float64):
        layer(x)
    nn.init.normal_(layer.weight)
    x, gradient = torch.randn(2, 4, 3, dtype=torch.float64)
    with calm(layer), bnstats.record_batch_stats(nn.Sequential(layer)) as record:
        output = layer(3 * x + 1)
        output.backward(gradient)
    y = ((output - layer.bias) / layer.weight).detach()
    weighted = layer.weight.detach() * gradient
    torch.testing.assert_close(record["0"].g[0], weighted.mean(0))
    torch.testing.assert_close(record["0"].psi[0], (y * weighted).mean(0))
    # y is linear in x: the mean is where it is 0.
    slope, offset = (y[1] - y[0]) / (3 * x[1] - 3 * x[0]), y[0]
    torch.testing.assert_close(record["0"].mean[0], 3 * x[0] + 1 - offset / slope)


def test_during_its_warmup_renorm_is_recorded_as_batchnorm_also_after_a_reset():
    layer = renorm(warmup=3)
    for _ in range(8):
        layer(torch.randn(8, 3, dtype=torch.float64))
    layer.reset_running_stats()
    x = torch.randn(8, 3, dtype=torch.float64)
    with bnstats.record_batch_stats(nn.Sequential(layer)) as record:
        layer(x).sum().backward()
    torch.testing.assert_close(record["0"].mean[0], x.mean(0))
    torch.testing.assert_close(record["0"].var[0], x.var(0, correction=0))


def test_a_batch_that_is_not_finite_is_recorded_as_it_is():
    layer = moving_average()
    for x in torch.randn(5, 8, 3, dtype=torch.float64):
        layer(x)
    with bnstats.record_batch_stats(nn.Sequential(layer)) as record:
        layer(torch.full((4, 3), torch.inf, dtype=torch.float64))
    assert not record["0"].var.isfinite().any()


@pytest.mark.parametrize("shape", cases.SHAPES.values(), ids=cases.SHAPES.keys())
def test_any_number_of_dimensions_is_recorded_as_its_values_are(shape):
    dims, size = shape
    layer = cases.PLAIN[dims](3).double()
    flat = nn.BatchNorm1d(3).double()
    x = torch.randn(size, dtype=torch.float64)
    grad = torch.randn_like(x)
    with bnstats.record_batch_stats(nn.Sequential(layer, flat)) as record:
        layer(x).backward(grad) if x.requires_grad else layer(x.requires_grad_()).backward(grad)
        rows = x.detach().movedim(1, -1).reshape(-1, 3).requires_grad_()
        flat(rows).backward(grad.movedim(1, -1).reshape(-1, 3))
    for name in ("mean", "var", "g", "psi"):
        torch.testing.assert_close(getattr(record["0"], name), getattr(record["1"], name))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_forwards_count_once_with_their_gradients(use_reentrant):
    torch.manual_seed(1)
    model = network(nn.BatchNorm1d(3))
    data = torch.randn(4, 8, 4).requires_grad_()
    with bnstats.record_batch_stats(model) as plain:
        for x in data:
            loss_of(model(x)).backward()
    with bnstats.record_batch_stats(model) as checkpointed:
        for x in data:
            loss_of(checkpoint(model, x, use_reentrant=use_reentrant)).backward()
    for name in ("mean", "var", "g", "psi"):
        a, b = getattr(plain["1"], name), getattr(checkpointed["1"], name)
        torch.testing.assert_close(a, b)


def test_checkpointed_forwards_get_their_own_gradients_in_any_order_of_backwards():
    model = network(nn.BatchNorm1d(3))
    data = torch.randn(3, 8, 4).requires_grad_()
    with bnstats.record_batch_stats(model) as plain:
        for x in data:
            loss_of(model(x)).backward()
    with bnstats.record_batch_stats(model) as checkpointed:
        losses = [loss_of(checkpoint(model, x, use_reentrant=True)) for x in data]
        for loss in losses:
            loss.backward()
    torch.testing.assert_close(checkpointed["1"].psi, plain["1"].psi)


def test_evaluation_is_not_recorded_and_a_missing_backward_is_nan():
    model = network(nn.BatchNorm1d(3))
    x = torch.randn(8, 4)
    with bnstats.record_batch_stats(model) as record:
        model.eval()(x)
        model.train()(x)
    assert len(record["1"]) == 1
    assert record["1"].mean.isfinite().all()
    assert record["1"].g.isnan().all()


def test_recording_changes_nothing_of_the_training():
    def trained(watch):
        torch.manual_seed(2)
        model = network(bnstats.EMABatchNorm1d(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def run():
            for x in torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(3)):
                optimizer.zero_grad()
                loss_of(model(x)).backward()
                optimizer.step()

        if watch:
            with bnstats.record_batch_stats(model):
                run()
        else:
            run()
        return model.state_dict()

    a, b = trained(False), trained(True)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("error", [None, ValueError("x"), KeyboardInterrupt()])
def test_the_hooks_are_gone_whatever_happened(error):
    model = network(nn.BatchNorm1d(3))
    try:
        with bnstats.record_batch_stats(model) as record:
            model(torch.randn(8, 4))
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert not model[1]._forward_hooks
    model(torch.randn(8, 4))
    assert len(record["1"]) == 1


def test_layers_are_chosen_by_name_and_the_nearest_is_said():
    model = nn.Sequential()
    for name in ("stem", "head"):
        model.add_module(name, nn.BatchNorm1d(3))
    with bnstats.record_batch_stats(model, ["head"]) as record:
        assert [*record] == ["head"]
    with pytest.raises(InvalidValueError, match=r"no BatchNorm layer 'haed'.*nearest.*'head'"):
        bnstats.record_batch_stats(model, ["haed"]).__enter__()
    with pytest.raises(InvalidValueError, match="nearest name is 'head'"):
        record["heads"]
    assert "heads" not in record
    with pytest.raises(InvalidValueError, match="at least one name"):
        bnstats.record_batch_stats(model, []).__enter__()
    with pytest.raises(InvalidTypeError, match=r"use \['head'\]"):
        bnstats.record_batch_stats(model, "head").__enter__()
    with pytest.raises(InvalidValueError, match="Linear has no BatchNorm layers"):
        bnstats.record_batch_stats(nn.Linear(2, 2)).__enter__()


def records():
    model = network(nn.BatchNorm1d(3))
    found = {}
    for n in (2, 32):
        with bnstats.record_batch_stats(model) as found[f"batch {n}"]:
            for x in torch.randn(5, n, 4):
                loss_of(model(x)).backward()
    return found


def test_four_panels_show_the_norms_of_each_record():
    both = records()
    figure = bnstats.plot_batch_stats(both, "1")
    assert [a.get_title() for a in figure.axes] == [
        "mean", "variance", "g = E[dL/dy]", "Psi = E[y dL/dy]",
    ]  # fmt: skip
    lines = figure.axes[3].get_lines()
    assert [line.get_label() for line in lines] == ["batch 2", "batch 32"]
    np.testing.assert_allclose(lines[0].get_ydata(), both["batch 2"]["1"].psi.norm(dim=1))
    assert len({line.get_linestyle() for line in lines}) == 2  # distinct in grey
    assert len(bnstats.plot_batch_stats(both["batch 2"], "1").axes[0].get_lines()) == 1


def test_drift_shows_the_worst_layers_first_and_no_more_than_asked():
    model = network(nn.BatchNorm1d(3)).append(nn.BatchNorm1d(2))
    model[4].running_mean.fill_(9)
    result = bnstats.recompute_population_stats(model, torch.randn(40, 4).split(8))
    for worst, names in ((20, ["4", "1"]), (1, ["4"]), (None, ["4", "1"])):
        shifts, ratios = bnstats.plot_drift(result, worst=worst).axes
        assert [t.get_text() for t in shifts.get_yticklabels()] == names
        np.testing.assert_allclose(shifts.get_lines()[0].get_xdata(), result.drift["4"].mean_shift)
        assert ratios.get_xscale() == "log"
        assert "eps" in shifts.get_xlabel()
        assert "eps" in ratios.get_xlabel()


@pytest.mark.parametrize("name", ["bn", "encoder.stages.3.blocks.12.mlp.norm_after_everything"])
def test_nothing_that_is_written_below_the_panels_overlaps_or_is_cut_off(name):
    model = nn.BatchNorm1d(2)
    for part in reversed(name.split(".")):
        model = nn.Sequential(OrderedDict({part: model}))
    stats = bnstats.measure_population_stats(model, torch.randn(40, 2).split(8))
    figure = bnstats.plot_drift(stats, model)
    figure.draw_without_rendering()
    shifts, ratios = (axes.xaxis.label.get_window_extent() for axes in figure.axes)
    assert shifts.x1 < ratios.x0
    assert ratios.x1 <= figure.bbox.x1
    assert shifts.x0 >= 0
    assert shifts.y0 >= 0


@pytest.mark.parametrize(
    ("worst", "says"),
    [(1, "the worst of 3 layers"), (2, "the worst 2 of 3 layers"), (3, "all 3 layers")],
)
def test_the_title_says_how_many_of_the_layers_are_shown(worst, says):
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(3)))
    result = bnstats.recompute_population_stats(model, torch.randn(40, 2).split(8))
    assert bnstats.plot_drift(result, worst=worst).get_suptitle().endswith(f", {says}")


def test_drift_is_drawn_of_a_result_of_a_report_and_of_statistics_with_their_model():
    model = network(nn.BatchNorm1d(3))
    stats = bnstats.measure_population_stats(model, torch.randn(40, 4).split(8))
    report = stats.drift_from(model)
    of_each = [
        bnstats.plot_drift(stats, model),
        bnstats.plot_drift(report),
        bnstats.plot_drift(bnstats.recompute_population_stats(model, torch.randn(40, 4).split(8))),
    ]
    for figure in of_each[:2]:
        shown = figure.axes[0].get_lines()[0].get_xdata()
        np.testing.assert_array_equal(shown, report["1"].mean_shift)
    assert len({figure.get_suptitle() for figure in of_each}) == 1
    with pytest.raises(InvalidTypeError, match=r"got none: plot_drift\(stats, model\)"):
        bnstats.plot_drift(stats)
    with pytest.raises(InvalidTypeError, match="expected none beside a DriftReport"):
        bnstats.plot_drift(report, model)
    with pytest.raises(InvalidTypeError, match=r"swapped, pass \(stats, model\)"):
        bnstats.plot_drift(model, stats)


def test_a_figure_survives_pickle_and_leaves_pyplot_alone():
    import pickle

    model = network(nn.BatchNorm1d(3))
    stats = bnstats.measure_population_stats(model, torch.randn(40, 4).split(8))
    figure = pickle.loads(pickle.dumps(bnstats.plot_drift(stats, model)))
    assert figure._repr_png_().startswith(b"\x89PNG")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_drift_shows_how_many_channels_are_dead():
    x = torch.randn(40, 3)
    for dead, says in ((2, "2 dead channels"), (1, "1 dead channel")):
        x[:, :dead] = 0
        result = bnstats.recompute_population_stats(nn.BatchNorm1d(3), x.split(8))
        figure = bnstats.plot_drift(result)
        assert figure.get_suptitle().endswith(says)
        x = torch.randn(40, 3)
        for axes in figure.axes:
            assert all(np.isfinite(line.get_xdata()).all() for line in axes.lines)
    result = bnstats.recompute_population_stats(nn.BatchNorm1d(3), x.split(8))
    assert "dead" not in bnstats.plot_drift(result).get_suptitle()


def test_what_cannot_be_drawn_says_why(monkeypatch):
    both = records()
    with bnstats.record_batch_stats(network(nn.BatchNorm1d(3))) as empty:
        pass
    with pytest.raises(InvalidValueError, match="layer '1' ran no training forward"):
        bnstats.plot_batch_stats(empty, "1")
    with pytest.raises(InvalidValueError, match="nearest name is '1'"):
        bnstats.plot_batch_stats(both, "bn1")
    with pytest.raises(InvalidTypeError, match="got list"):
        bnstats.plot_batch_stats([empty], "1")
    with pytest.raises(InvalidValueError, match="at least one"):
        bnstats.plot_batch_stats({}, "1")
    with pytest.raises(InvalidTypeError, match="expected a Recalibration"):
        bnstats.plot_drift(both)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "bnstats.diagnosis.figure", raising=False)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        bnstats.plot_batch_stats(both, "1")


def test_the_estimated_error_of_a_running_average_is_the_one_that_simulation_finds():
    # 400 averages over fixed weights, each of 60 batches of 16 whose means differ.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 16, 400, generator=generator)
    x += torch.randn(60, 1, 400, generator=generator)
    layer = bnstats.EMABatchNorm1d(400, momentum=0.1, pooled=False)
    for batch in x:
        layer(batch)
    one_channel = x.permute(2, 0, 1)[:100].reshape(-1, 16, 1)
    stats = bnstats.measure_population_stats(
        nn.BatchNorm1d(1), [*one_channel], method="batch_average"
    )
    error = bnstats.estimate_running_error(stats, momentum=0.1, num_batches=60)[""]
    assert error.effective_batches == pytest.approx(19, rel=1e-2)
    # 400 repetitions know a standard deviation to 3.5 % (one sigma).
    assert float(layer.running_mean.std() / error.mean_stderr) == pytest.approx(1, abs=0.1)
    assert float(layer.running_var.std() / error.var_stderr) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_the_estimated_error_is_given_in_the_units_of_drift_too(eps):
    layer = bnstats.EMABatchNorm1d(400, momentum=0.1, pooled=False, eps=eps)
    data = list(torch.randn(60, 16, 400) + torch.randn(60, 1, 400))
    for batch in data:
        layer(batch)
    stats = bnstats.measure_population_stats(layer, data, method="batch_average")
    error = bnstats.estimate_running_error(stats, momentum=0.1)[""]
    population = bnstats.LayerStats(
        **{**vars(stats[""]), "mean": torch.zeros(400).double(), "var": torch.ones(400).double()}
    )
    drift = bnstats.PopulationStats({"": population}).drift_from(layer)[""]
    pairs = [(drift.mean_shift, error.mean_shift), (drift.var_ratio - 1, error.var_ratio)]
    for real, expected in pairs:
        assert float(real.square().mean() / expected.square().mean()) == pytest.approx(1, abs=0.2)


def test_a_young_debiased_average_is_worth_its_batches():
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(2), torch.randn(64, 2).split(8))
    for batches, worth in ((1, 1), (3, 2.98), (10**6, 19)):
        error = bnstats.estimate_running_error(stats, num_batches=batches)[""]
        assert error.effective_batches == pytest.approx(worth, rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"momentum": 0}, InvalidValueError, r"in \(0, 1\], got 0"),
        ({"num_batches": 0}, InvalidValueError, "num_batches: expected 1 or more"),
        ({"stats": {}}, InvalidTypeError, "expected PopulationStats, got dict"),
    ],
)
def test_misuse_of_the_estimate_is_named(arguments, error, says):
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(2), torch.randn(64, 2).split(8))
    with pytest.raises(error, match=says):
        bnstats.estimate_running_error(**{"stats": stats, **arguments})
    ema = bnstats.measure_population_stats(
        nn.BatchNorm1d(2), torch.randn(64, 2).split(8), method="ema"
    )
    with pytest.raises(InvalidValueError, match='got "ema"'):
        bnstats.estimate_running_error(ema)


def test_watching_a_training_and_recalibrating_at_its_end(tmp_path):
    # Train, measure every few epochs, recalibrate, save, load into a plain model: the same output.
    def make(norm):
        return nn.Sequential(nn.Linear(4, 16), norm(16), nn.ReLU(), nn.Linear(16, 2))

    x = torch.randn(256, 4)
    y = (x[:, 0] > 0).long()
    model = make(bnstats.EMABatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    shifts = []
    for epoch in range(4):
        model.train()
        for i in torch.randperm(256).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
        if epoch % 2 == 1:
            drift = bnstats.measure_population_stats(model, x.split(16)).drift_from(model)["1"]
            shifts.append(float(drift.mean_shift.abs().max()))
    assert all(0 < shift < 1 for shift in shifts)
    bnstats.recompute_population_stats(model, x.split(16))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    plain = make(nn.BatchNorm1d)
    plain.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(plain.eval()(x), model.eval()(x))
    assert (plain(x).argmax(1) == y).float().mean() > 0.9
