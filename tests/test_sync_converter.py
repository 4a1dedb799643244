"""torch's converter to SyncBatchNorm makes plain layers of ours: they notice, and warn."""

import copy
import warnings

import pytest
import torch
from torch import nn

import bnstats
import cases
from bnstats.errors import BnstatsWarning

torchs = nn.SyncBatchNorm.convert_sync_batchnorm


def timms(model):
    return pytest.importorskip("timm").layers.convert_sync_batchnorm(model)


@cases.each_family
@pytest.mark.parametrize("converter", [torchs, timms], ids=["torch", "timm"])
def test_the_converter_is_warned_of_at_the_callers_line(family, converter):
    # Lightning's Trainer(sync_batchnorm=True) calls it too.
    model = nn.Sequential(nn.Conv2d(3, 3, 1), family.make(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = converter(model)
    (warning,) = caught
    assert warning.category is BnstatsWarning
    assert f"in the place of {family.layers[2].__name__}" in str(warning.message)
    assert "call it first, and bnstats.convert_batchnorm on the model" in str(warning.message)
    assert type(converted[1]) is nn.SyncBatchNorm  # if torch keeps our class, this can all go


def test_a_model_of_many_layers_warns_once():
    model = nn.Sequential(*(bnstats.EMABatchNorm2d(3) for _ in range(50)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        torchs(model)
    assert len(caught) == 1


@cases.each_family
def test_the_order_that_the_warning_names_keeps_the_family(family):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = bnstats.convert_batchnorm(torchs(model), family.name)  # warnings are errors here
    assert type(model[1]) is family.base
    assert model(torch.randn(4, 3, 5, 5)).isfinite().all()


@cases.each_family
def test_the_attribute_that_the_converter_asks_for_is_as_torch_has_it(family):
    layer = family.make(1)
    assert not hasattr(layer, "qconfig")
    assert getattr(layer, "qconfig", 5) == 5
    assert not hasattr(type(layer), "qconfig")
    with pytest.raises(AttributeError, match=f"'{type(layer).__name__}' object has no attribute"):
        _ = layer.qconfig
    layer.qconfig = "of quantization"
    assert layer.qconfig == copy.deepcopy(layer).qconfig == "of quantization"
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


def test_a_layer_that_quantization_has_configured_is_converted_with_it():
    model = nn.Sequential(bnstats.EMABatchNorm1d(3))
    model[0].qconfig = "of quantization"
    assert torchs(model)[0].qconfig == "of quantization"


def test_torchs_own_layers_are_converted_without_a_warning():
    assert type(torchs(nn.Sequential(nn.BatchNorm1d(3)))[0]) is nn.SyncBatchNorm
