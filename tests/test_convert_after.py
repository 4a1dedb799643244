"""What a converted or reverted model goes through: training, wrappers, copies, export."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnstats
from cases import FAMILIES
from versions import fails_on_oldest

torchvision = pytest.importorskip("torchvision")

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


@pytest.fixture(autouse=True)
def _one_thread():
    # Inputs are tiny: threads gain nothing, and where cores are shared they wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step(model, x, optimizer=None):
    """One step of training; the loss."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model.train()(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


# Training goes on


@functools.cache  # drawing its eleven million weights would be most of a test
def untrained():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


@pytest.fixture
def resnet():
    model = copy.deepcopy(untrained())
    torch.manual_seed(0)
    return model


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


@families
def test_an_optimizer_built_before_trains_every_parameter_of_the_converted_model(resnet, family):
    optimizer = torch.optim.SGD(resnet.parameters(), lr=0.01)
    bnstats.convert_batchnorm(resnet, family.name)
    before = {name: p.detach().clone() for name, p in resnet.named_parameters()}
    step(resnet, torch.randn(IMAGES), optimizer)
    for name, parameter in resnet.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@families
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_converted_model_compiles_without_graph_breaks(resnet, family):
    del resnet.layer2, resnet.layer3, resnet.layer4  # the same blocks again
    model = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.layer1, nn.Flatten())
    bnstats.convert_batchnorm(model, family.name)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(IMAGES)
    torch.testing.assert_close(step(compiled, x), step(twin, x))
    # As far as float32 lets two orders of summation agree.
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


@families
def test_copies_of_a_converted_model_train_alike_and_apart(resnet, family):
    bnstats.convert_batchnorm(resnet, family.name)
    step(resnet, torch.randn(IMAGES))
    twin = copy.deepcopy(resnet)
    x = torch.randn(IMAGES)
    assert step(resnet, x) == step(twin, x)
    torch.testing.assert_close(resnet.state_dict(), twin.state_dict(), rtol=0, atol=0)
    step(resnet, x)
    assert not torch.equal(resnet.bn1.running_var, twin.bn1.running_var)


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("order", ["converted, wrapped", "wrapped, converted"])
@families
def test_distributed_data_parallel_trains_a_converted_model(resnet, order, family):
    twin = bnstats.convert_batchnorm(copy.deepcopy(resnet), family.name)
    if order == "converted, wrapped":
        bnstats.convert_batchnorm(resnet, family.name)
    parallel = nn.parallel.DistributedDataParallel(resnet)
    if order == "wrapped, converted":
        bnstats.convert_batchnorm(parallel, family.name)
    for x in torch.randn(2, *IMAGES):
        assert step(parallel, x) == step(twin, x)
    torch.testing.assert_close(resnet.state_dict(), twin.state_dict(), rtol=0, atol=0)


@families
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_of_a_converted_model_works(resnet, use_buffers, family):
    bnstats.convert_batchnorm(resnet, family.name)
    averaged = torch.optim.swa_utils.AveragedModel(resnet, use_buffers=use_buffers)
    for x in torch.randn(2, *IMAGES):
        step(resnet, x)
        averaged.update_parameters(resnet)
    if not use_buffers:
        torch.optim.swa_utils.update_bn(torch.randn(2, *IMAGES), averaged)
    assert averaged.eval()(torch.randn(IMAGES)).isfinite().all()
    assert {type(bn) for bn in batchnorms(averaged)} == {family.layers[2]}


# After the way back


@pytest.fixture(params=FAMILIES, ids=lambda f: f.name)
def plain(resnet, request):
    """A network that was converted, trained and reverted."""
    bnstats.convert_batchnorm(resnet, request.param.name)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization_fuses_a_reverted_model(plain):
    x = torch.randn(IMAGES)
    with torch.no_grad():
        expected = plain(x)
        fused = torch.ao.quantization.fuse_modules(plain, [["conv1", "bn1", "relu"]])
        assert isinstance(fused.bn1, nn.Identity)
        torch.testing.assert_close(fused(x), expected, **CLOSE)


@fails_on_oldest("no BatchNorm of torch's either with onnxscript from 0.5.4 on, its issue 2651")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_takes_a_reverted_model(plain, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(1, 3, 16, 16)  # the evaluator is in numpy
    model = nn.Sequential(plain.conv1, plain.bn1, plain.relu).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    assert onnx.load(path).graph.node
    (output,) = ReferenceEvaluator(str(path)).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), **CLOSE)
