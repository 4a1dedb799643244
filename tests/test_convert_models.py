"""Conversion of torchvision's and timm's models, and what a model goes through afterwards.

Every classification model of torchvision that has BatchNorm is covered whole, at its real
width. Weights are random but not torchvision's own initialization, which would take most of
the time; inputs are two images of the smallest legal size.
"""

import contextlib
import copy
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

SMALLEST = {"inception_v3": 299, "maxvit_t": 224}  # the auxiliary head, the fixed windows
OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
HUGE = "regnet_y_128gf"  # 645 million parameters


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
    with torch.no_grad():
        for parameter in model.parameters():
            bound = (3 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 1
            parameter.uniform_(-bound if parameter.dim() > 1 else 0.5, bound)
        x = torch.randn(2, 3, *[SMALLEST.get(name, 32)] * 2)
        model.train()(x)
    return model.eval(), x


def step(model, x, optimizer=None):
    """One step of training; the loss."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    output = model.train()(x)
    output = output if isinstance(output, torch.Tensor) else output[0]
    loss = output.square().mean()
    optimizer.zero_grad()
    loss.backward()
    # Two images leave the deepest layers two values to a channel: gradients grow to 1e14.
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize("name", NORMALIZED)
def test_torchvisions_classifiers_convert_and_come_back(name):
    model, x = build(name)
    keys = list(model.state_dict())
    types = [type(module) for module in model.modules()]
    if name == HUGE:
        # Gradients of all weights would double its memory, past what a small machine has.
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.requires_grad_(False)
    with torch.no_grad():
        expected = model(x)
        assert expected.isfinite().all()
        bnstats.convert_batchnorm(model, "ema")
        assert all(isinstance(layer, bnstats.EMABatchNorm2d) for layer in batchnorms(model)), name
        assert torch.equal(model(x), expected)
        assert torch.equal(bnstats.revert_batchnorm(model)(x), expected)
        assert torch.equal(bnstats.convert_batchnorm(model, "cumulative")(x), expected)
        assert torch.equal(bnstats.revert_batchnorm(model)(x), expected)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == types
    for family in ("ema", "cumulative"):
        assert step(bnstats.convert_batchnorm(model, family), x).isfinite()


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


def test_timms_efficientnet_is_refused_by_conversion_and_served_by_recalibration():
    # pytorch#187298: torch's own converter drops the activation of such a layer
    timm = pytest.importorskip("timm")
    model = timm.create_model("efficientnet_b0", pretrained=False)
    before = [type(module) for module in model.modules()]
    with pytest.raises(bnstats.errors.InvalidTypeError, match=r"'bn1' \(BatchNormAct2d\).*forward"):
        bnstats.convert_batchnorm(model, "ema")
    assert [type(module) for module in model.modules()] == before
    loader = torch.randn(8, 3, 32, 32).split(4)
    result = bnstats.recompute_population_stats(model, loader)
    assert len(result.after) == len(batchnorms(model))


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


# Training goes on


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


IMAGES = (4, 3, 32, 32)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_built_before_goes_on_as_if_nothing_happened(resnet, make):
    # Training output and gradients are nn.BatchNorm's: the same optimizer takes the same steps.
    twin = copy.deepcopy(resnet)
    optimizers = [make(model.parameters(), lr=0.01) for model in (resnet, twin)]
    batches = torch.randn(4, *IMAGES)
    for i, x in enumerate(batches):
        losses = [step(m, x, o) for m, o in zip((resnet, twin), optimizers, strict=True)]
        assert losses[0] == losses[1]
        if i == 1:
            bnstats.convert_batchnorm(resnet, "ema")
    for p, q in zip(resnet.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_converted_model_compiles_without_graph_breaks(resnet):
    bnstats.convert_batchnorm(resnet, "ema")
    twin = copy.deepcopy(resnet)
    compiled = torch.compile(resnet, backend="aot_eager", fullgraph=True)
    x = torch.randn(IMAGES)
    torch.testing.assert_close(step(compiled, x), step(twin, x))
    # As far as float32 lets the two orders of summation agree.
    torch.testing.assert_close(resnet.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("order", ["converted, wrapped", "wrapped, converted"])
@pytest.mark.parametrize("family", ["ema", "cumulative"])
def test_distributed_data_parallel_trains_a_converted_model(resnet, order, family):
    twin = bnstats.convert_batchnorm(copy.deepcopy(resnet), family)
    if order == "converted, wrapped":
        bnstats.convert_batchnorm(resnet, family)
    parallel = nn.parallel.DistributedDataParallel(resnet)
    if order == "wrapped, converted":
        bnstats.convert_batchnorm(parallel, family)
    for x in torch.randn(2, *IMAGES):
        assert step(parallel, x) == step(twin, x)
    torch.testing.assert_close(resnet.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_of_a_converted_model_works(resnet, use_buffers):
    bnstats.convert_batchnorm(resnet, "ema")
    averaged = torch.optim.swa_utils.AveragedModel(resnet, use_buffers=use_buffers)
    for x in torch.randn(2, *IMAGES):
        step(resnet, x)
        averaged.update_parameters(resnet)
    if not use_buffers:
        torch.optim.swa_utils.update_bn(torch.randn(2, *IMAGES), averaged)
    assert averaged.eval()(torch.randn(IMAGES)).isfinite().all()
    assert {type(bn) for bn in batchnorms(averaged)} == {bnstats.EMABatchNorm2d}


# After the way back


@pytest.fixture
def plain(resnet):
    """A network that was converted, trained and reverted."""
    bnstats.convert_batchnorm(resnet, "ema")
    for x in torch.randn(2, *IMAGES):
        step(resnet, x)
    return bnstats.revert_batchnorm(resnet).eval()


# Kernels that were fused or exported add up in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_takes_a_reverted_model(plain):
    x = torch.randn(IMAGES)
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(torch.jit.trace(plain, x)(x), expected, **CLOSE)
        torch.testing.assert_close(torch.jit.script(plain)(x), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_fx_traces_and_fuses_a_reverted_model(plain):
    from torch.fx.experimental.optimization import fuse

    x = torch.randn(IMAGES)
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(torch.fx.symbolic_trace(plain)(x), expected)
        fused = fuse(plain)
        assert not batchnorms(fused)
        torch.testing.assert_close(fused(x), expected, **CLOSE)


def test_fuse_conv_bn_eval_takes_reverted_layers(plain):
    x = torch.randn(IMAGES)
    with torch.no_grad():
        expected = plain.bn1(plain.conv1(x))
        fused = nn.utils.fusion.fuse_conv_bn_eval(plain.conv1, plain.bn1)
        torch.testing.assert_close(fused(x), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_takes_a_reverted_model(plain, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(1, 3, 32, 32)
    model = nn.Sequential(plain.conv1, plain.bn1, plain.relu).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    assert onnx.load(path).graph.node
    (output,) = ReferenceEvaluator(str(path)).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), **CLOSE)
