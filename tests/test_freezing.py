"""Frozen layers normalize with their running statistics, whatever is done to the model."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import bnstats
from bnstats.errors import BnstatsWarning, InvalidTypeError
from cases import FAMILIES
from networks import network as convolutions
from networks import uneven

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "torch": nn.BatchNorm1d,
    "torch, synchronized": nn.SyncBatchNorm,
    **{f.name: f.layers[1] for f in FAMILIES},
    "moving_average": functools.partial(bnstats.MovingAverageBatchNorm1d, window=3, warmup=2),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def network(make):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(3, 4), make(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Sequential(make(4))
    )
    for i in range(6):
        model(torch.randn(8, 3) + i).square().sum().backward()
    model.zero_grad()
    return model


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def assert_frozen(model, x=None):
    """In every mode of the model the layers evaluate, no buffer moves, and parameters learn."""
    x = torch.randn(8, 3) if x is None else x
    before = [buffer.clone() for buffer in model.buffers()]
    for layer in batchnorms(model):
        layer.register_forward_hook(assert_evaluates)
    for mode in (True, False, True):
        model.train(mode)
        model.zero_grad()
        model(x).square().sum().backward()
        for a, b in zip(model.buffers(), before, strict=True):
            assert torch.equal(a, b)
        for layer in batchnorms(model):
            assert layer.weight.grad.abs().sum() > 0


def assert_evaluates(layer, args, output):
    expected = F.batch_norm(
        args[0], layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
    )
    assert torch.equal(output, expected)


@each_layer
def test_layers_normalize_with_running_statistics_and_parameters_learn(make):
    model = network(make)
    assert bnstats.freeze_statistics(model) is model
    assert_frozen(model)
    assert model.training
    assert model[2].training


@each_layer
def test_copies_and_pickles_are_frozen_and_thaw_by_themselves(make):
    model = bnstats.freeze_statistics(network(make))
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in others:
        bnstats.thaw_statistics(other)
        assert all(module.training for module in other.modules())
        assert_frozen(copy.deepcopy(model))
        assert_frozen(pickle.loads(pickle.dumps(model)))
    assert not any(layer.training for layer in batchnorms(model.train()))


@each_layer
@pytest.mark.parametrize("modes", [[], [True], [False], [False, True], [True, False]])
@pytest.mark.parametrize("start", [True, False])
def test_thawing_leaves_what_would_be_without_freezing(make, start, modes):
    model = network(make).train(start)
    model[1].train(not start)
    other = copy.deepcopy(model)
    attributes = [list(vars(module)) for module in model.modules()]
    bnstats.freeze_statistics(model)
    bnstats.freeze_statistics(model)
    for mode in modes:
        model.train(mode)
        other.train(mode)
    assert bnstats.thaw_statistics(model) is model
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]
    assert [list(vars(module)) for module in model.modules()] == attributes
    for mode in (True, False):
        assert [m.training for m in model.train(mode).modules()] == [mode] * 7
    bnstats.thaw_statistics(model)


@each_layer
def test_include_chooses_layers(make):
    model = network(make)
    bnstats.freeze_statistics(model, lambda name, _: name == "4.0").train()
    assert [layer.training for layer in batchnorms(model)] == [True, False]
    bnstats.freeze_statistics(model)
    bnstats.thaw_statistics(model, lambda name, _: name == "4.0")
    assert [layer.training for layer in batchnorms(model)] == [False, True]


def test_what_is_inside_a_layer_goes_by_its_mode():
    class Activated(nn.BatchNorm1d):
        def __init__(self, *args):
            super().__init__(*args)
            self.drop = nn.Dropout()

    layer = bnstats.freeze_statistics(Activated(3))
    assert layer.drop.training
    assert not layer.eval().drop.training
    assert layer.train() is layer
    assert layer.drop.training
    assert not layer.training
    with pytest.raises(ValueError, match="boolean"):
        layer.train("no")


@pytest.mark.parametrize("to", ["ema", "cumulative", "moving_average", "renorm"])
@pytest.mark.filterwarnings("ignore:the model will evaluate differently")
def test_conversion_keeps_layers_frozen_both_ways(to):
    model = bnstats.freeze_statistics(network(nn.BatchNorm1d))
    assert_frozen(bnstats.convert_batchnorm(copy.deepcopy(model), to))
    assert_frozen(bnstats.revert_batchnorm(bnstats.convert_batchnorm(copy.deepcopy(model), to)))
    model = bnstats.thaw_statistics(bnstats.revert_batchnorm(bnstats.convert_batchnorm(model, to)))
    assert all(module.training for module in model.modules())


@each_layer
def test_compiled_code_sees_it(make):
    torch.compiler.reset()
    counter, x = CompileCounter(), torch.randn(8, 3)
    model = network(make)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    bnstats.freeze_statistics(compiled)
    for mode in (True, False, True, False):
        compiled.train(mode)
        before = [buffer.clone() for buffer in model.buffers()]
        compiled(x).square().sum().backward()
        for a, b in zip(model.buffers(), before, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 3  # training; frozen with dropout, and without
    bnstats.thaw_statistics(compiled).train()
    compiled(x)
    assert not torch.equal(model[1].running_var, before[1])
    assert counter.frame_count <= 3


@each_layer
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_run_frozen_layers_again_as_they_are(make, use_reentrant):
    model = bnstats.freeze_statistics(network(make)).train()
    before = [buffer.clone() for buffer in model.buffers()]
    x = torch.randn(8, 3, requires_grad=True)
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    for a, b in zip(model.buffers(), before, strict=True):
        assert torch.equal(a, b)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["pooled", "batch_average", "ema", "layerwise", "sweeps"])
@pytest.mark.parametrize("training", [True, False])
def test_recalibration_leaves_frozen_layers_alone_and_names_them(method, training):
    model = convolutions()
    bnstats.freeze_statistics(model, lambda name, _: name == "5").train(training)
    before = [buffer.clone() for buffer in model[5].buffers()]
    result = bnstats.recompute_population_stats(model, uneven(), method=method)
    assert result.after.frozen == ("5",)
    assert [*result.after] == ["1", "8"]
    assert "left alone, frozen or in evaluation mode while the model trains: '5'" in str(result)
    for a, b in zip(model[5].buffers(), before, strict=True):
        assert torch.equal(a, b)
    assert not model.train()[5].training
    bnstats.thaw_statistics(model)
    assert [*bnstats.measure_population_stats(model, uneven(), method=method)] == ["1", "5", "8"]


@pytest.mark.filterwarnings("ignore:all 116 BatchNorm layers are frozen")
def test_of_many_frozen_layers_a_result_names_the_first_and_keeps_them_all():
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(116)))
    bnstats.freeze_statistics(model)
    result = bnstats.recompute_population_stats(model, [torch.randn(4, 2)])
    assert len(result.after.frozen) == 116
    assert max(map(len, str(result).splitlines())) < 120
    for text in (str(result), repr(result), result._repr_html_().replace("&#x27;", "'")):
        assert "while the model trains: '0', '1', '2' and 113 more" in text
        assert "'3'" not in text


def test_a_frozen_model_is_exported_as_it_is():
    model = bnstats.freeze_statistics(network(nn.BatchNorm1d)).train()
    model[2].p = 0.0
    x = torch.randn(8, 3)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_frozen_model_goes_through_torchscript_and_fx():
    model = bnstats.freeze_statistics(network(nn.BatchNorm1d)).eval()
    x = torch.randn(8, 3)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    traced = torch.fx.symbolic_trace(model)
    assert_frozen(traced)


def test_averages_of_the_weights_are_frozen_too():
    model = bnstats.freeze_statistics(network(nn.BatchNorm1d))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    assert not any(layer.training for layer in batchnorms(average.train()))


def test_a_held_frozen_layer_evaluates():
    model = bnstats.freeze_statistics(network(nn.BatchNorm1d)).train()
    with bnstats.hold_statistics(model):
        assert_frozen(model)
    assert_frozen(model)


def test_bad_input():
    with pytest.raises(InvalidTypeError, match=r"expected a torch\.nn\.Module, got int"):
        bnstats.freeze_statistics(3)
    lazy = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    for change in (bnstats.freeze_statistics, bnstats.thaw_statistics):
        with pytest.raises(InvalidTypeError, match="lazy"):
            change(lazy)
        assert lazy[0].training
        with pytest.warns(BnstatsWarning, match="no BatchNorm layer .* nothing to"):
            change(nn.Linear(2, 2))
        with pytest.warns(BnstatsWarning, match="that include chooses, of 2: '1', '4.0'"):
            change(network(nn.BatchNorm1d), lambda *_: False)
