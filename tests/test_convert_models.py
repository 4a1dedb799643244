"""Conversion of torchvision's and timm's models, and what a model goes through afterwards.

Every classification model of torchvision that has BatchNorm is covered whole, at its real
width. Weights are random but not torchvision's own initialization, which would take most of
the time; inputs are two images of the smallest legal size.
"""

import contextlib
import time
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnstats

torchvision = pytest.importorskip("torchvision")
from torchvision.models import detection, get_model, list_models, segmentation  # noqa: E402
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402

WITHOUT_BATCHNORM = ("alexnet", "convnext_", "squeezenet", "swin_", "vit_")
WITHOUT_BATCHNORM_TOO = ("vgg11", "vgg13", "vgg16", "vgg19")
CLASSIFIERS = list_models(module=torchvision.models)
NORMALIZED = [
    name
    for name in CLASSIFIERS
    if not name.startswith(WITHOUT_BATCHNORM) and name not in WITHOUT_BATCHNORM_TOO
]

SMALLEST = {"inception_v3": (2, 3, 299, 299), "maxvit_t": (1, 3, 224, 224)}
"""The first for its auxiliary head in training, the second for its fixed windows."""

OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


@pytest.fixture(autouse=True)
def _one_thread():
    # Inputs are tiny: threads gain nothing, and where cores are shared they wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def no_initialization():
    with contextlib.ExitStack() as stack:
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(
                    mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor)
                )
        yield


def build(name):
    """A model with random weights, and running statistics that one batch has moved."""
    with no_initialization():
        model = get_model(name, weights=None, **OPTIONS.get(name, {}))
    # As many random numbers as it takes: drawing 2e9 of them would be most of the test.
    pool = torch.rand(1 << 20)
    with torch.no_grad():
        for parameter in model.parameters():
            centered = parameter.dim() > 1
            scale = (12 / parameter[0].numel()) ** 0.5 if centered else 1
            parts = parameter.view(-1).split(len(pool))
            numbers = pool[: len(parts[0])]
            numbers = (numbers - 0.5) * scale if centered else numbers
            for part in parts:
                part.copy_(numbers[: len(part)])
        x = torch.randn(SMALLEST.get(name, (2, 3, 32, 32)))
        model.train()(x)
    return model.eval(), x


def step(model, x):
    """One step of training; the loss."""
    output = model.train()(x)
    output = output if isinstance(output, torch.Tensor) else output[0]
    loss = output.square().mean()
    loss.backward()
    # Two images leave the deepest layers two values to a channel: gradients grow to 1e14.
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.zero_grad()
    return loss.detach()


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize("name", NORMALIZED)
def test_torchvisions_classifiers_convert_and_come_back(name):
    model, x = build(name)
    keys = list(model.state_dict())
    types = [type(module) for module in model.modules()]
    for module in model.modules():
        # Its gradient, its clipping and its step are torch's alone, and most of the time; those
        # of 645 million parameters would not fit into a small machine's memory.
        if isinstance(module, nn.Conv2d):
            module.weight.requires_grad_(False)
    with torch.no_grad():
        expected = model(x)
        assert expected.isfinite().all()
        bnstats.convert_batchnorm(model, "ema")
        assert {type(layer) for layer in batchnorms(model)} == {bnstats.EMABatchNorm2d}
        assert torch.equal(model(x), expected)
        bnstats.convert_batchnorm(model, "cumulative")
        assert {type(layer) for layer in batchnorms(model)} == {bnstats.CumulativeBatchNorm2d}
        assert torch.equal(model(x), expected)
        bnstats.revert_batchnorm(model)
        assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == types
    families = ["ema", "cumulative"]
    if sum(p.numel() for p in model.parameters()) > 1e8:
        families.pop()  # seconds each, and the same layers as in their small relatives
    for family in families:
        assert step(bnstats.convert_batchnorm(model, family), x).isfinite()


SOME = ["densenet121", "googlenet", "mnasnet0_5", "mobilenet_v3_small", "regnet_y_400mf"]
SOME += ["resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5"]


@pytest.mark.filterwarnings("ignore:the model will evaluate differently:bnstats.BnstatsWarning")
@pytest.mark.parametrize("name", SOME)
def test_some_classifiers_of_every_kind_train_with_moving_averages_and_come_back(name):
    model, x = build(name)
    keys = list(model.state_dict())
    bnstats.convert_batchnorm(model, "moving_average", window=2, warmup=0)
    convolutions = [type(m) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {*convolutions} == {bnstats.CenteredConv2d}
    for _ in range(3):
        assert step(model, x).isfinite()
    expected = model.eval()(x)
    bnstats.revert_batchnorm(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys


def test_every_classifier_that_is_not_covered_has_no_batchnorm():
    for name in sorted({*CLASSIFIERS} - {*NORMALIZED}):
        with torch.device("meta"):
            assert batchnorms(get_model(name, weights=None)) == [], name


def test_converting_resnet152_is_fast_and_copies_nothing():
    with no_initialization():
        model = torchvision.models.resnet152(weights=None)
    parameters = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    for change in (lambda m: bnstats.convert_batchnorm(m, "ema"), bnstats.revert_batchnorm):
        start = time.perf_counter()
        change(model)
        assert time.perf_counter() - start < 1
        now = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
        assert list(now.items()) == list(parameters.items())
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_modules()] == names


# Segmentation and detection: what needs no compiled operator runs


@pytest.mark.parametrize("name", list_models(module=segmentation))
def test_torchvisions_segmentation_models_convert(name):
    with no_initialization():
        model = get_model(name, weights=None, weights_backbone=None)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    x = torch.randn(2, 3, 33, 33)
    expected = model.eval()(x)["out"]
    assert torch.equal(bnstats.convert_batchnorm(model, "ema")(x)["out"], expected)
    model.train()(x)["out"].mean().backward()
    assert all(layer.num_batches_tracked == 1 for layer in batchnorms(model))
    bnstats.revert_batchnorm(model)
    assert {type(layer) for layer in batchnorms(model)} == {nn.BatchNorm2d}


LAYERS = [bnstats.EMABatchNorm2d, bnstats.CumulativeBatchNorm2d]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_segmentation_model_with_our_norm_layer_trains_and_comes_back(layer):
    dilated = [False, True, True]
    backbone = torchvision.models.resnet50(norm_layer=layer, replace_stride_with_dilation=dilated)
    model = segmentation.FCN(
        IntermediateLayerGetter(backbone, {"layer4": "out"}),
        segmentation.fcn.FCNHead(2048, 3),
    )
    x = torch.randn(2, 3, 33, 33)
    model(x)["out"].mean().backward()
    expected = model.eval()(x)["out"]
    assert torch.equal(bnstats.revert_batchnorm(model)(x)["out"], expected)
    assert not any(isinstance(module, layer) for module in model.modules())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_detector_with_our_norm_layer_trains_and_comes_back(layer):
    # In training RetinaNet needs none of the compiled operators; in evaluation its nms is one.
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=layer, trainable_layers=5
    )
    model = detection.RetinaNet(backbone, num_classes=2, min_size=64, max_size=64)
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 64)] * 2, [target] * 2)
    sum(losses.values()).backward()
    layers = batchnorms(model)
    assert {type(bn) for bn in layers} == {layer}
    assert all(bn.num_batches_tracked == 1 for bn in layers)
    x = torch.randn(1, 3, 64, 64)
    expected = model.eval().backbone(x)
    for key, value in bnstats.revert_batchnorm(model).backbone(x).items():
        assert torch.equal(value, expected[key])
    assert {type(bn) for bn in batchnorms(model)} == {nn.BatchNorm2d}


# timm


def test_timms_resnet_converts_and_comes_back():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", pretrained=False)
    x = torch.randn(2, 3, 32, 32)
    model.train()(x)
    expected = model.eval()(x)
    assert torch.equal(bnstats.convert_batchnorm(model, "ema")(x), expected)
    assert step(model, x).isfinite()
    expected = model.eval()(x)
    assert torch.equal(bnstats.revert_batchnorm(model)(x), expected)
