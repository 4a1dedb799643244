"""On real architectures: evaluation normalizes every layer to mean 0 and variance var/(var+eps)."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnstats

# name, pixels, whether there are layers that evaluation does not reach
ARCHITECTURES = [
    ("resnet18", 32, False),
    ("densenet121", 32, False),
    ("mobilenet_v2", 32, False),
    ("inception_v3", 75, True),
]


def build(name):
    models = importlib.import_module("torchvision.models")
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "inception_v3" else {}
    model = getattr(models, name)(weights=None, **options)
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # as after training: neither 1 nor 0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def data_of(pixels):
    """Batches of different scale and size."""
    return [torch.randn(n, 3, pixels, pixels) * s + s / 4 for n, s in ((6, 1), (3, 2.5), (5, 1.6))]


@torch.no_grad()
def normalized_outputs(model, data):
    """Mean and variance over all data of each layer's output before weight and bias."""
    model = copy.deepcopy(model).eval()
    moments = {}

    def observe(name):
        def hook(module, args):
            y = nn.functional.batch_norm(
                args[0].double(),
                module.running_mean.double(),
                module.running_var.double(),
                eps=module.eps,
            )
            batch = bnstats.Moments.from_batch(y)
            moments[name] = moments[name] + batch if name in moments else batch

        return hook

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(observe(name))
    for x in data:
        model(x)
    return moments


@pytest.fixture
def _one_thread():
    # Layerwise runs each batch on one thread; with more, torch chooses other convolution
    # kernels, and what they round differently (1.1e-5 in the worst channel) is no residual.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.filterwarnings("ignore:no batch reached:bnstats.BnstatsWarning")
@pytest.mark.parametrize(("name", "pixels", "unreached"), ARCHITECTURES)
def test_layerwise_and_sweeps_find_the_fixed_point_and_the_same(name, pixels, unreached):
    model, data = build(name), data_of(pixels)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    found = {}
    for method in ("layerwise", "sweeps"):
        result = bnstats.recompute_population_stats(model, data, method=method, correction=0)
        found[method] = result.after
        assert unreached or result.after.keys() == layers.keys()
        for layer, moments in normalized_outputs(model, data).items():
            var, eps = result.after[layer].var, layers[layer].eps
            lively = var > eps
            assert moments.mean[lively].abs().max() < 1e-5, (method, layer)
            expected = var / (var + eps)
            assert (moments.var(0) / expected - 1)[lively].abs().max() < 1e-3, (method, layer)
        result.undo()
    for layer, one in found["layerwise"].items():
        other, eps = found["sweeps"][layer], layers[layer].eps
        scale = (one.var + eps).sqrt()
        assert ((one.mean - other.mean) / scale).abs().max() < 1e-4
        assert ((one.var - other.var) / scale.square()).abs().max() < 1e-4


def test_sweeps_cost_at_most_three_fifths_of_a_forward_per_layer():
    model, data = build("resnet18"), data_of(32)
    multiplications = []

    def count(module, _, output):
        multiplications.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    bnstats.measure_population_stats(model, data)
    one_forward = sum(multiplications)
    multiplications.clear()
    stats = bnstats.measure_population_stats(model, data, method="sweeps")
    assert sum(multiplications) / one_forward <= 0.6 * len(stats)


def test_a_single_pass_leaves_a_residual_where_batches_differ():
    # What the exact methods are for: the shift of the deepest layers is no rounding.
    model, data = build("resnet18"), data_of(32)
    bnstats.recompute_population_stats(model, data, method="pooled", correction=0)
    worst = max(m.mean.abs().max() for m in normalized_outputs(model, data).values())
    assert worst > 0.1
