"""Planted faults are named, healthy models are not accused, and what is not known is said."""

import copy
import functools
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import TensorDataset

import bnstats
import networks
from bnstats.cli import main
from bnstats.cli.digits import Digits, convolutional_net, multilayer_perceptron
from bnstats.errors import InvalidTypeError, InvalidValueError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return Digits.load(0)


@pytest.fixture(scope="module")
def healthy(digits):
    torch.manual_seed(0)
    return {make: fit(make(), digits) for make in (convolutional_net, perceptron)}


def perceptron():
    return multilayer_perceptron(nn.BatchNorm1d, nn.Linear)


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def fit(model, digits, *, steps=200, batch=32, lr=0.1, momentum=0.1, anneal=True, each=None):
    for layer in batchnorms(model):
        layer.momentum = momentum
    images, labels = digits.train.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) if anneal else lr
        chosen = torch.randint(len(images), (batch,))
        model.train()
        if each is not None:
            each(model)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model


def batches(data, size=32):
    return list(zip(*(part.split(size) for part in data.tensors), strict=True))


def correct(model, batch):
    return model(batch[0]).argmax(1) == batch[1]


def freeze_second(model):
    batchnorms(model)[1].eval()


FAULTS = {
    "averages lag": {"steps": 40, "anneal": False},
    "momentum too high": {"momentum": 0.9},
    "too few updates": {"steps": 5},
    "batch too small": {"batch": 2, "lr": 0.02},
    "layers frozen": {"each": freeze_second},
}


# In the convolutional net two samples bring 128 values to a channel: no fault.
PLANTED = [
    (fault, make)
    for fault in FAULTS
    for make in (convolutional_net, perceptron)
    if (fault, make) != ("batch too small", convolutional_net)
]


@pytest.mark.parametrize(("fault", "make"), PLANTED)
def test_faults_of_training_are_named(digits, fault, make):
    options = FAULTS[fault]
    loader = batches(digits.train, options.get("batch", 32))[:100]
    diagnosis = bnstats.diagnose(fit(make(), digits, **options), loader)
    assert diagnosis.verdict == fault
    assert diagnosis.evidence
    assert diagnosis.remedy.startswith("bnstats.recompute_population_stats(")


@pytest.mark.parametrize("make", [convolutional_net, perceptron])
def test_trained_nets_are_healthy_and_their_fault_if_any_is_elsewhere(digits, healthy, make):
    model, loader = copy.deepcopy(healthy[make]), batches(digits.train)
    for options in (
        {},
        {"metric": correct},
        {"target": batches(digits.test)},
        {"metric": correct, "target": batches(digits.test)},
        {"metric": correct, "expected": 0.9},
    ):
        diagnosis = bnstats.diagnose(model, loader, **options)
        assert diagnosis.verdict == "healthy", diagnosis
        assert diagnosis.healthy
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[torch.arange(10).roll(1)])
    diagnosis = bnstats.diagnose(model, loader, metric=correct, expected=0.9)
    assert diagnosis.verdict == "not the batch norm"
    assert "0.9 was expected" in str(diagnosis)
    # Without an expectation nobody can know; the evidence says what is left.
    diagnosis = bnstats.diagnose(model, loader, metric=correct)
    assert "it is not the batch norm" in str(diagnosis)


def test_a_shifted_validation_set_is_other_data(digits, healthy):
    model, loader = healthy[convolutional_net], batches(digits.train)
    images, labels = digits.test.tensors
    shifted = batches(TensorDataset(images + 1, labels))
    for options in ({}, {"metric": correct}):
        diagnosis = bnstats.diagnose(model, loader, target=shifted, **options)
        assert diagnosis.verdict == "other data"
        assert "'bn1'" in diagnosis.evidence[0]
        assert "prior=" in diagnosis.remedy
    metrics = diagnosis.metrics
    assert metrics["target"].mean - metrics["running"].mean > 3 * metrics["target"].stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_buffers_that_cannot_normalize_are_named(value):
    model = networks.trained()
    model[5].running_var[1] = value
    diagnosis = bnstats.diagnose(model, networks.uneven())
    assert diagnosis.verdict == "not finite"
    assert "1 of 3 BatchNorm layers" in diagnosis.evidence[0]
    assert "'5'" in diagnosis.evidence[0]


def test_a_half_buffer_that_overflowed_is_named():
    model = nn.Sequential(nn.BatchNorm1d(3)).half()
    model(torch.randn(64, 3).half() * 2000)
    assert model[0].running_var.isinf().all()
    assert bnstats.diagnose(model, torch.randn(64, 3).half().split(8)).verdict == "not finite"


def test_layers_are_found_frozen_by_their_counters_and_momentum(digits):
    model = fit(convolutional_net(), digits, each=freeze_second, steps=100).eval()
    diagnosis = bnstats.diagnose(model, batches(digits.train))
    assert diagnosis.verdict == "layers frozen"
    assert "it has counted 0 batches, and others 100" in diagnosis.evidence[0]
    model = fit(convolutional_net(), digits, momentum=0.0, steps=50)
    assert "its momentum is 0" in str(bnstats.diagnose(model, batches(digits.train)))


def test_layers_that_were_frozen_on_purpose_are_left_out_and_named():
    model = networks.trained()
    bnstats.freeze_statistics(model, include=lambda name, _: name == "5")
    assert "1 frozen layers were left out: '5'" in str(bnstats.diagnose(model, networks.uneven()))


def test_weights_that_are_nan_are_not_the_batch_norms_fault():
    model = networks.trained()
    model[0].weight.data.fill_(float("nan"))
    diagnosis = bnstats.diagnose(model, networks.uneven())
    assert diagnosis.verdict == "not the batch norm"


def test_a_model_without_batch_norm_has_another_fault():
    diagnosis = bnstats.diagnose(nn.Linear(3, 3), [torch.randn(4, 3)])
    assert diagnosis.verdict == "not the batch norm"
    assert "no BatchNorm layer" in diagnosis.evidence[0]


def test_few_samples_cannot_tell():
    model = nn.Sequential(nn.BatchNorm1d(4))
    bnstats.recompute_population_stats(model, torch.randn(10_000, 4).split(100))
    for loader in ([torch.randn(6, 4)], [torch.randn(1, 4)]):
        assert bnstats.diagnose(model, loader).verdict == "cannot tell"
    loader = list(torch.randn(50, 20, 4))

    def metric(model, batch):
        return model(batch).mean()

    diagnosis = bnstats.diagnose(model, loader[:8], metric=metric)
    assert diagnosis.verdict == "cannot tell"
    assert "8 samples" in str(diagnosis)
    assert bnstats.diagnose(model, loader, metric=metric).verdict == "healthy"


def test_the_metric_is_the_mean_over_samples_with_its_standard_error(digits):
    model, target = fit(convolutional_net(), digits, steps=20), batches(digits.test, 100)
    diagnosis = bnstats.diagnose(model, batches(digits.train), metric=correct, target=target)
    images, labels = digits.test.tensors
    with torch.no_grad():
        right = (model.eval()(images).argmax(1) == labels).double()
    running = diagnosis.metrics["running"]
    assert running.mean == pytest.approx(float(right.mean()))
    assert running.stderr == pytest.approx(float(right.std() / len(right) ** 0.5))
    bnstats.recompute_population_stats(model, batches(digits.train))
    with torch.no_grad():
        right = (model.eval()(images).argmax(1) == labels).double()
    assert diagnosis.metrics["population"].mean == pytest.approx(float(right.mean()))


def test_moving_averages_trained_at_batch_2_are_healthy(digits):
    layer = bnstats.MovingAverageBatchNorm1d
    model = multilayer_perceptron(layer, bnstats.CenteredLinear)
    fit(model, digits, batch=2, steps=150, lr=0.02, momentum=0.02)
    diagnosis = bnstats.diagnose(model, batches(digits.train, 2)[:200])
    assert diagnosis.verdict != "batch too small"


def test_a_renorm_that_trains_with_what_it_evaluates_with_is_not_accused_of_small_batches(digits):
    layer = functools.partial(bnstats.RenormBatchNorm1d, warmup=0, ramp=0)
    model = fit(
        multilayer_perceptron(layer, nn.Linear), digits, batch=2, steps=150, lr=0.02, momentum=0.02
    )
    diagnosis = bnstats.diagnose(model, batches(digits.train, 2)[:200])
    assert diagnosis.verdict != "batch too small"


ARCHITECTURES = [
    *("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0"),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_after_a_few_honest_steps_are_not_accused(name):
    model = torchvision.models.get_model(name, num_classes=10)
    loader = torch.randn(4, 16, 3, 32, 32).unbind()
    diagnosis = bnstats.diagnose(honest_steps(model, loader), loader)
    assert diagnosis.verdict in ("healthy", "cannot tell"), diagnosis


class StochasticDepth(nn.Module):
    """Drops a residual branch of whole samples, as torchvision's and timm's do."""

    def __init__(self, part):
        super().__init__()
        self.part, self.drop = part, torchvision.ops.StochasticDepth(0.5, "row")

    def forward(self, x):
        return x + self.drop(self.part(x))


def with_dropout(norm=nn.BatchNorm1d):
    parts = (nn.Sequential(nn.Linear(16, 16), norm(16), nn.ReLU()) for _ in range(4))
    return nn.Sequential(*map(StochasticDepth, parts), norm(16), nn.Linear(16, 10))


def test_averages_under_dropout_do_not_lag_and_only_a_metric_knows_what_becomes_of_them():
    # torchvision's MaxViT and larger EfficientNets drop up to a fifth of their branches.
    loader = torch.randn(40, 64, 16).unbind()
    model = honest_steps(with_dropout(), loader)
    before, state = networks.snapshot(model), torch.get_rng_state()
    diagnosis = bnstats.diagnose(model, loader)
    networks.assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert diagnosis.verdict == "cannot tell"
    assert "with dropout, or stochastic depth, as in training" in diagnosis.evidence[0]
    assert "only a metric can tell" in str(diagnosis)
    assert "diagnose again with a metric" in diagnosis.remedy
    assert bnstats.diagnose(model, loader).evidence == diagnosis.evidence
    assert "stochastic depth" in str(bnstats.diagnose(model, iter(loader)))  # is read once

    def indifferent(model, batch):
        return torch.randn(len(batch), generator=torch.Generator().manual_seed(0))

    variance = bnstats.measure_population_stats(model, loader)["4"].var
    assert variance.mean() < 0.8 * model[4].running_var.mean()

    def better_with_less(model, batch):
        return -model[4].running_var.mean().expand(len(batch))

    assert bnstats.diagnose(model, loader, metric=indifferent).verdict == "healthy"
    assert bnstats.diagnose(model, loader, metric=better_with_less).verdict == "averages lag"


def test_averages_of_earlier_weights_lag_with_dropout_too():
    loader = torch.randn(40, 64, 16).unbind()
    model = honest_steps(with_dropout(), loader)
    with torch.no_grad():
        model[0].part[0].weight.mul_(3)
    diagnosis = bnstats.diagnose(model, loader)
    assert diagnosis.verdict == "averages lag"
    assert "with dropout as in training it is" in diagnosis.evidence[0]


class OverflowsInTraining(nn.Module):
    def forward(self, x):
        return x * float("inf") if self.training else x


class RaisesInTraining(nn.Module):
    def forward(self, x):
        if self.training:
            raise RuntimeError("targets are needed in training")
        return x


class Once:
    """Can be iterated over once, as many a stream can, and is no iterator."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    ("random", "once", "says"),
    [
        (OverflowsInTraining(), False, "non-finite"),
        (RaisesInTraining(), False, "targets are needed in training"),
        (nn.Dropout(0.1), True, "at least one batch, got none"),
    ],
)
def test_what_cannot_be_measured_with_dropout_on_costs_no_verdict(random, once, says):
    loader = torch.randn(40, 64, 16).unbind()
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), random, nn.BatchNorm1d(16)).eval()
    bnstats.recompute_population_stats(model, loader)
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[1].num_batches_tracked.fill_(40)
        model[3].num_batches_tracked.fill_(40)
    before = networks.snapshot(model)
    diagnosis = bnstats.diagnose(model, Once(loader) if once else loader)
    networks.assert_untouched(model, before)
    assert diagnosis.verdict == "averages lag"
    assert "'1'" in diagnosis.evidence[0]
    assert "or of values under dropout or stochastic depth" in diagnosis.evidence[0]
    assert "could not be measured" in diagnosis.evidence[-1]
    assert says in diagnosis.evidence[-1]


class LayerDrop(nn.Module):
    """Whether a layer is to run: in training here, it is not."""

    def forward(self):
        return not self.training


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.drop = nn.BatchNorm1d(16), nn.BatchNorm1d(16), LayerDrop()

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if self.drop() else x


@pytest.mark.filterwarnings("ignore:no batch reached these layers")
def test_a_layer_that_does_not_run_in_training_is_diagnosed_without():
    loader, model = torch.randn(40, 64, 16).unbind(), Skipping().eval()
    bnstats.recompute_population_stats(model, loader)
    for layer in batchnorms(model):
        layer.num_batches_tracked.fill_(40)
    model.second.running_var.mul_(2)
    diagnosis = bnstats.diagnose(model, loader)
    assert diagnosis.verdict == "averages lag"
    assert "'second'" in diagnosis.evidence[0]


@pytest.mark.parametrize(
    ("bad", "verdict"),
    [(torch.full((8, 4), torch.nan), "not the batch norm"), (torch.randn(1, 4), "cannot tell")],
)
def test_a_target_that_cannot_be_measured_costs_no_verdict(bad, verdict):
    loader = list(torch.randn(50, 20, 4))
    lagging = nn.Sequential(nn.BatchNorm1d(4))
    bnstats.recompute_population_stats(lagging, loader)
    lagging[0].num_batches_tracked.fill_(50)
    right = copy.deepcopy(lagging)
    lagging[0].running_mean.add_(1)

    def metric(model, batch):
        return model(batch).mean(1)

    for options in ({}, {"metric": metric}):
        diagnosis = bnstats.diagnose(lagging, loader, target=[bad], **options)
        assert diagnosis.verdict == "averages lag"
        assert diagnosis.evidence[-1].startswith("the target could not be measured: ")
        diagnosis = bnstats.diagnose(right, loader, target=[bad], **options)
        assert diagnosis.verdict == verdict
        assert diagnosis.evidence[-1].startswith("the target could not be measured: ")


def honest_steps(model, loader):
    """A few steps of training whose running statistics are averages over all of them."""
    for layer in batchnorms(model):
        layer.momentum = None
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for x in loader:
        F.cross_entropy(model.train()(x), torch.arange(len(x)) % 10).backward()
        optimizer.step()
    return model.eval()


def lagging(loader, shift=0.5):
    """Return a model whose running mean is off, with a layer behind it."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    bnstats.recompute_population_stats(model, loader)
    model[0].num_batches_tracked.fill_(len(loader))
    model[0].running_mean.add_(shift)
    return model


def test_no_verdict_recommends_what_makes_the_metric_worse():
    """A pretrained classifier on other pictures: its head was trained behind its statistics."""
    loader = list(torch.randn(50, 20, 4))
    model = lagging(loader)
    head = copy.deepcopy(model)

    def metric(model, batch):
        return -(model(batch) - head(batch)).square().sum(1)

    assert bnstats.diagnose(model, loader).verdict == "averages lag"
    diagnosis = bnstats.diagnose(model, loader, metric=metric)
    assert diagnosis.verdict == "cannot tell"
    assert "population statistics make the metric worse" in diagnosis.evidence[-1]
    diagnosis = bnstats.diagnose(model, loader, metric=lambda *args: -metric(*args))
    assert diagnosis.verdict == "averages lag"


@pytest.mark.parametrize("share", [1, 4])
def test_a_metric_that_overflows_with_running_statistics_alone_is_evidence(share):
    loader = list(torch.randn(50, 20, 4))
    model = lagging(loader, shift=0.05)  # no distance that is large

    def overflowing(model, batch):
        bad = torch.arange(len(batch)) % share == 0
        off = abs(float(model[0].running_mean.mean())) > 0.04
        return -torch.where(bad & off, torch.inf, model(batch).square().mean(1))

    assert bnstats.diagnose(model, loader).verdict == "healthy"
    diagnosis = bnstats.diagnose(model, loader, metric=overflowing, expected=0.0)
    assert diagnosis.verdict == "averages lag"
    num = 1000 // share
    assert f"NaN or infinite for {num} of them with running statistics" in diagnosis.evidence[-1]
    assert diagnosis.metrics["running"].mean == -torch.inf
    assert diagnosis.metrics["population"].stderr > 0
    model[0].running_mean.sub_(0.05)
    assert bnstats.diagnose(model, loader, metric=overflowing).verdict == "healthy"


@pytest.mark.filterwarnings("ignore:all 1 BatchNorm layers are frozen")
def test_what_is_frozen_as_a_whole_can_be_thawed():
    loader = list(torch.randn(50, 20, 4))
    diagnosis = bnstats.diagnose(bnstats.freeze_statistics(lagging(loader)), loader)
    assert diagnosis.verdict == "cannot tell"
    assert "bnstats.thaw_statistics(model.eval())" in diagnosis.evidence[0]
    assert diagnosis.remedy == "bnstats.thaw_statistics(model.eval()), and diagnose again"


def test_the_model_is_left_as_it_was(digits):
    model = fit(convolutional_net(), digits, steps=5)
    model[3].eval()
    before = networks.snapshot(model)
    loader = batches(digits.train)
    bnstats.diagnose(model, loader, metric=correct, target=batches(digits.test))
    networks.assert_untouched(model, before)

    def failing(model, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bnstats.diagnose(model, loader, metric=failing)
    networks.assert_untouched(model, before)


def test_wrappers_dicts_and_forwards_are_taken_as_in_the_recalibration():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    loader = [{"x": x} for x in torch.randn(10, 16, 3)]
    wrapped = torch.optim.swa_utils.AveragedModel(model)
    diagnosis = bnstats.diagnose(
        wrapped, loader, forward=lambda model, batch: model(batch["x"]), max_batches=5
    )
    assert diagnosis.verdict == "too few updates"
    assert [*diagnosis.drift] == ["1"]


def test_misuse_is_refused_by_name():
    model, loader = networks.network(), networks.uneven()
    for error, match, options in [
        (InvalidTypeError, "metric: expected a function metric", {"metric": 3}),
        (InvalidValueError, "expected: there is no metric", {"expected": 0.9}),
        (InvalidTypeError, "a number for each sample", {"metric": lambda *_: "good"}),
        (InvalidValueError, "finite numbers", {"metric": lambda *_: float("nan")}),
        (InvalidTypeError, "target: expected an iterable", {"target": torch.zeros(3)}),
    ]:
        with pytest.raises(error, match=match):
            bnstats.diagnose(model, loader, **options)
    with pytest.raises(InvalidValueError, match="loader: it is read again for the metric"):
        bnstats.diagnose(model, iter(loader), metric=lambda *_: 1.0)
    with pytest.raises(InvalidValueError, match="at least one batch"):
        bnstats.diagnose(model, [])
    with pytest.raises(InvalidTypeError, match=r"torch\.nn\.Module"):
        bnstats.diagnose(loader, loader)


MODULE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

def loader():
    return list(torch.randn(10, 16, 3, generator=torch.Generator().manual_seed(0)))

def metric(model, batch):
    return -model(batch).square().mean(1)
"""


def test_the_command_prints_verdict_evidence_and_remedy(tmp_path, monkeypatch, capsys):
    (tmp_path / "case.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "case", raising=False)
    command = ["diagnose", "case:model", "case:loader"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("verdict: too few updates\n- ")
    assert "remedy: bnstats.recompute_population_stats(model, loader)" in out

    import case

    model = case.model()
    bnstats.recompute_population_stats(model, case.loader())
    torch.save(model.state_dict(), "in.pt")
    more = ["--checkpoint", "in.pt", "--metric", "case:metric", "--target", "case:loader"]
    assert main([*command, *more, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("verdict: healthy\n")
    assert main([*command, "--expected", "1"]) == 2
    assert "there is no metric" in capsys.readouterr().err


def test_a_loader_that_is_sorted_by_class_is_told_so_and_its_batches_are_not_too_small(
    digits, healthy
):
    images, labels = digits.train.tensors
    order = labels.argsort()
    loader = list(zip(images[order].split(64), labels[order].split(64), strict=True))
    diagnosis = bnstats.diagnose(healthy[perceptron], loader)
    assert diagnosis.verdict == "cannot tell"
    assert "shuffle the loader" in diagnosis.evidence[0]
