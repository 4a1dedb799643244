"""timm's layers that normalize and activate in one: every family, and back to the very class."""

import copy
import importlib
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnstats
import cases

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")  # timm imports it
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d  # noqa: E402
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct  # noqa: E402

FAMILIES = ("ema", "cumulative", "moving_average", "renorm")
PARTS = {"ema": bnstats.EMABatchNorm, "moving_average": bnstats.MovingAverageBatchNorm}
each_target = pytest.mark.parametrize("to", FAMILIES)

# A small model of each of timm's modules (files) whose models are built of BatchNormAct2d.
MODELS = [
    "coatnet_pico_rw_224",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "densenet121",
    "dpn48b",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "ese_vovnet19b_slim_dw",
    "fastvit_t8",
    "ghostnet_050",
    "halonet_h1",
    "hardcorenas_b",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "nasnetalarge",
    "pnasnet5large",
    "regnetx_002",
    "repghostnet_050",
    "resnetv2_18",
    "rexnet_100",
    "skresnet18",
    "test_byobnet",
    "tresnet_m",
    "xception41p",
]


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def classes(model):
    return [type(module) for module in model.modules()]


def step(model, x):
    model.train().zero_grad(set_to_none=True)
    output = model(x)
    output = output[0] if isinstance(output, tuple) else output
    loss = output.square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_converts_and_comes_back_to_its_classes(name):
    with torch.device("meta"):  # classes and keys are checked here; numbers below
        model = timm.create_model(name)
    before, keys = classes(model), [*model.state_dict()]
    activated = sum(type(layer) is BatchNormAct2d for layer in batchnorms(model))
    assert activated
    for to in ("ema", "moving_average"):
        bnstats.convert_batchnorm(model, to)
        converted = [layer for layer in batchnorms(model) if isinstance(layer, PARTS[to])]
        assert len(converted) == len(batchnorms(model))
        assert sum(isinstance(layer, BatchNormAct2d) for layer in converted) == activated
    bnstats.revert_batchnorm(model)
    assert classes(model) == before
    assert [*model.state_dict()] == keys


def trained(name="test_efficientnet", count=3):
    model = timm.create_model(name)
    for _ in range(count):
        model(torch.randn(4, 3, 64, 64))
    return model


@pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet"])
@pytest.mark.parametrize("to", ["ema", "cumulative", "renorm"])
def test_evaluation_training_and_recalibration_are_those_of_timms_layers(name, to):
    model, x = trained(name), torch.randn(4, 3, 64, 64)
    twin = copy.deepcopy(model)
    before, state = classes(model), cases.state(model)
    bnstats.convert_batchnorm(model, to)
    assert torch.equal(model.eval()(x), twin.eval()(x))
    assert step(model, x).item() == pytest.approx(step(twin, x).item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        # float32, summed in another order through a dozen layers.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    batches = list(torch.randn(3, 4, 3, 64, 64))
    for each in (model, twin):
        bnstats.recompute_population_stats(each, batches, method="layerwise")
    torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-4, atol=1e-5)
    expected = model(x)
    assert torch.equal(bnstats.revert_batchnorm(model)(x), expected)
    assert classes(model) == before
    assert model.state_dict().keys() == state.keys()


# Those of MODELS that take little time in numbers.
QUICK = [
    "coatnet_pico_rw_224",
    "cs3darknet_focus_s",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "fastvit_t8",
    "ghostnet_050",
    "lcnetv2_small",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "regnetx_002",
    "repghostnet_050",
    "resnetv2_18",
]
SIZED = {"coatnet_pico_rw_224", "efficientformerv2_s0"}  # built for images of one size


@pytest.mark.parametrize("name", QUICK)
def test_the_numbers_of_each_architecture_are_those_of_timms_layers(name):
    """In float64, which leaves rounding no room to grow over a hundred layers."""
    torch.manual_seed(0)
    options = {"img_size": 64} if name in SIZED else {}
    model = timm.create_model(name, num_classes=5, **options).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    model.train()(x)  # running statistics of their own
    twin, before, state = copy.deepcopy(model), classes(model), cases.state(model)
    bnstats.convert_batchnorm(model, "ema")
    assert torch.equal(model.eval()(x), twin.eval()(x))
    losses = []
    for each in (model, twin):
        torch.manual_seed(1)  # of stochastic depth
        losses.append(step(each, x))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            assert_near(ours.grad, theirs.grad)
    for each in (model, twin):
        bnstats.recompute_population_stats(each, [x, x.flip(0) * 2 + 1])
    expected = model.eval()(x)
    assert_near(expected, twin.eval()(x))
    assert torch.equal(bnstats.revert_batchnorm(model)(x), expected)
    assert classes(model) == before
    assert model.state_dict().keys() == state.keys()


def assert_near(ours, theirs):
    """Equal up to rounding of the largest: what should be zero is the rest of large numbers."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7 * theirs.abs().max().item() + 1e-12)


def test_moving_averages_train_behind_centered_convolutions_and_come_back():
    model, x = timm.create_model("test_efficientnet"), torch.randn(2, 3, 64, 64)
    before = classes(model)
    bnstats.convert_batchnorm(model, "moving_average", warmup=0, renorm_warmup=0, window=2)
    for _ in range(4):
        assert step(model, x).isfinite()
    bnstats.recompute_population_stats(model, [x])
    expected = model.eval()(x)
    torch.testing.assert_close(bnstats.revert_batchnorm(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert classes(model) == before


def test_one_layer_normalizes_drops_out_and_activates():
    def layer(cls):
        torch.manual_seed(0)
        return cls(3, act_layer=nn.SiLU, drop_layer=partial(nn.Dropout, 0.5)).train()

    from bnstats.integrations.timm import EMABatchNormAct2d

    ours, theirs, x = layer(EMABatchNormAct2d), layer(BatchNormAct2d), torch.randn(4, 3, 5, 5)
    outputs = []
    for each in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(each(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(ours.running_mean, x.mean((0, 2, 3)))


@each_target
def test_without_running_statistics_a_layer_activates_once(to):
    layer = BatchNormAct2d(3, act_layer=nn.SiLU, track_running_stats=False)
    if to == "moving_average":
        with pytest.raises(bnstats.errors.InvalidValueError, match="track_running_stats"):
            bnstats.convert_batchnorm(nn.Sequential(layer), to)
        return
    x = torch.randn(4, 3, 5, 5)
    expected = layer(x)
    torch.testing.assert_close(bnstats.convert_batchnorm(nn.Sequential(layer), to)(x), expected)


@each_target
def test_converted_models_are_copied_pickled_and_loaded(to):
    model, x = timm.create_model("test_efficientnet"), torch.randn(2, 3, 64, 64)
    plain = copy.deepcopy(model)
    bnstats.convert_batchnorm(model, to)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(twin) == classes(model)
        assert torch.equal(twin.eval()(x), model.eval()(x))
        assert classes(bnstats.revert_batchnorm(twin)) == classes(plain)
    model.load_state_dict(plain.state_dict(), strict=True)


@each_target
def test_a_synchronized_layer_of_timms_comes_back_as_one(to):
    model = convert_sync_batchnorm(timm.create_model("test_efficientnet"))
    before, x = classes(model), torch.randn(2, 3, 64, 64)
    assert SyncBatchNormAct in before
    expected = model.eval()(x)
    bnstats.convert_batchnorm(model, to)
    assert all(isinstance(layer, BatchNormAct2d) for layer in batchnorms(model))
    if to != "moving_average":
        assert torch.equal(model(x), expected)
    assert step(model, x).isfinite()
    assert classes(bnstats.revert_batchnorm(model)) == before


@pytest.mark.parametrize("converted", [False, True], ids=["timm's", "converted"])
def test_batch_statistics_are_recorded_before_the_activation(converted):
    activated = nn.Sequential(BatchNormAct2d(3, act_layer=nn.SiLU, inplace=True))
    if converted:
        bnstats.convert_batchnorm(activated, "ema")
    plain, x = nn.Sequential(nn.BatchNorm2d(3), nn.SiLU()), torch.randn(4, 3, 5, 5)
    records = []
    for model in (activated, plain):
        with bnstats.record_batch_stats(model) as record:
            for _ in range(2):
                model(x).square().sum().backward()
        records.append(record["0"])
    assert len(records[0]) == 2
    for statistic in ("mean", "var", "g", "psi"):
        ours, reference = (getattr(record, statistic) for record in records)
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    assert not activated[0]._forward_pre_hooks
    assert not activated[0].drop._forward_pre_hooks


def test_timm_freezes_converted_layers_as_its_own():
    model, x = trained(), torch.randn(2, 3, 64, 64)
    bnstats.convert_batchnorm(model, "ema")
    expected = model.eval()(x)
    torch.testing.assert_close(freeze_batch_norm_2d(model)(x), expected, rtol=1e-4, atol=1e-5)


class Doubled(BatchNormAct2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_timms_layer_is_refused_as_any_other():
    model = nn.Sequential(Doubled(3))
    with pytest.raises(bnstats.errors.InvalidTypeError, match=r"'0' \(Doubled\).* its own forward"):
        bnstats.convert_batchnorm(model, "ema")
    assert type(model[0]) is Doubled


@each_target
def test_timm_builds_models_of_a_familys_layers(to):
    from bnstats.integrations.timm import norm_act_layer

    plain, x = trained(), torch.randn(2, 3, 64, 64)
    norm_layer = norm_act_layer(to, act_layer=nn.SiLU, momentum=0.05)
    model = timm.create_model("test_efficientnet", norm_layer=norm_layer)
    assert {layer.momentum for layer in batchnorms(model)} == {0.05}
    assert not any(type(layer) is BatchNormAct2d for layer in batchnorms(model))
    if to == "ema":
        model.load_state_dict(plain.state_dict(), strict=True)
        assert torch.equal(model.eval()(x), plain.eval()(x))
    assert step(model, x).isfinite()
    assert {type(layer) for layer in batchnorms(bnstats.revert_batchnorm(model))} == {
        BatchNormAct2d
    }


def test_timm_builds_models_with_plain_normalization_of_the_class_itself():
    model = timm.create_model("test_resnet", norm_layer=bnstats.EMABatchNorm2d)
    assert {type(layer) for layer in batchnorms(model)} == {bnstats.EMABatchNorm2d}


def test_an_unknown_family_is_refused():
    from bnstats.integrations.timm import norm_act_layer

    with pytest.raises(bnstats.errors.InvalidValueError, match="expected one of ema, cumulative"):
        norm_act_layer("plain")


def test_timm_is_not_imported_before_a_layer_of_its_is_there():
    code = """
import sys, torch, bnstats
model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3))
bnstats.convert_batchnorm(model, "ema")
bnstats.recompute_population_stats(model, [torch.ones(2, 3, 4, 4)])
bnstats.revert_batchnorm(model)
assert not any(name.split(".")[0] in ("timm", "torchvision") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_timm_its_module_names_the_remedy(monkeypatch):
    for name in ("bnstats.integrations.timm", "bnstats.layers.batch_norm_act"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "timm.layers.norm_act", None)
    with pytest.raises(ImportError, match="pip install timm"):
        importlib.import_module("bnstats.integrations.timm")
