"""Layers with a forward of their own are centered in it: TensorFlow's "same" padding, for one."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.checkpoint import checkpoint

import bnstats
from bnstats.layers.centered import centered
from versions import fails_on_oldest


class SamePadding(nn.Conv2d):
    """The convolution of EfficientNet-PyTorch and of what descends from it."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Scaling(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


class Rescaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def network():
    model = nn.Sequential(
        *(SamePadding(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
        *(Scaling(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Flatten()),
        *(Rescaled(64, 5), nn.BatchNorm1d(5)),
    )
    return model


def convert(model, **options):
    return bnstats.convert_batchnorm(model, "moving_average", **options)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PLACES = (0, 3, 6)


def with_centered_weights(layer):
    """A plain layer with the weights that the forward is to use."""
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight.copy_(centered(plain.weight))
    return plain


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: SamePadding(3, 4, 2), X),
        (lambda: Scaling(3, 4, 2), X),
        (lambda: Rescaled(8, 4), torch.ones(2, 8)),
    ],
)
def test_its_own_forward_runs_with_the_centered_weight(make, x):
    model = nn.Sequential(make(), nn.BatchNorm1d(4) if x.dim() == 2 else nn.BatchNorm2d(4))
    reference = with_centered_weights(model[0])
    convert(model)
    torch.testing.assert_close(model[0](x), reference(x))


def test_parameters_keys_attributes_and_what_the_forward_keeps_stay_the_layers():
    model = network()
    layer, keys, parameters = model[0], list(model.state_dict()), list(model.parameters())
    convert(model)
    assert model[0] is layer
    assert isinstance(layer, SamePadding)
    assert layer.weight is parameters[0]
    assert [key for key in model.state_dict() if key in keys] == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    layer(X)
    layer(X)
    assert layer.calls == 2


def test_gradients_reach_the_parameter_and_have_no_mean():
    model = convert(network())
    model(X).square().sum().backward()
    for place in PLACES:
        grad = model[place].weight.grad
        assert grad.abs().max() > 0
        torch.testing.assert_close(
            grad.flatten(1).mean(1), torch.zeros(len(grad)), atol=1e-5, rtol=0
        )


def test_the_way_back_folds_and_evaluates_to_the_same():
    model = network()
    classes = [type(module) for module in model]
    convert(model)(X).sum().backward()
    expected = model.eval()(X)
    bnstats.revert_batchnorm(model)
    assert [type(module) for module in model] == classes
    torch.testing.assert_close(model(X), expected)
    for place in PLACES:
        means = model[place].weight.flatten(1).mean(1)
        torch.testing.assert_close(means, torch.zeros_like(means), atol=1e-6, rtol=0)


def test_converting_twice_is_converting_once():
    model = convert(network())
    classes = [type(module) for module in model]
    expected = model[0](X)
    assert [type(module) for module in convert(model)] == classes
    assert torch.equal(model[0](X), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_centered_too(copied):
    model = convert(network()).eval()
    other = copied(model)
    assert [type(module) for module in other] == [type(module) for module in model]
    assert torch.equal(other(X), model(X))
    assert type(bnstats.revert_batchnorm(other)[0]) is SamePadding


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, prune.identity, weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_computed_weight_is_centered_as_it_is_computed(wrap):
    layer = SamePadding(3, 4, 2)
    reference = with_centered_weights(layer)
    model = nn.Sequential(layer, nn.BatchNorm2d(4))
    wrap(layer, *(["weight"] if wrap is prune.identity else []))
    convert(model)
    torch.testing.assert_close(model[0](X), reference(X))


def test_a_parametrization_that_comes_later_is_centered():
    model = convert(nn.Sequential(SamePadding(3, 4, 2), nn.BatchNorm2d(4)))
    expected = model[0](X)
    parametrizations.weight_norm(model[0])
    torch.testing.assert_close(model[0](X), expected)


def test_forwards_in_many_threads_do_not_see_each_other():
    model = convert(nn.Sequential(SamePadding(3, 4, 2), nn.BatchNorm2d(4)))
    layer, expected, wrong = model[0], model[0](X), []

    def forwards():
        wrong.extend(0 for _ in range(200) if not torch.equal(layer(X), expected))

    threads = [threading.Thread(target=forwards) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert isinstance(layer.weight, nn.Parameter)


@fails_on_oldest("its compiler knows no layer made by object.__new__")
def test_it_compiles_whole_and_exports():
    model = convert(network()).eval()
    expected = model(X)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(X), expected
    )
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)
    with torch.no_grad():
        model[0].weight.mul_(2)
    compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model[0](X))


def test_its_state_can_come_as_an_argument():
    model = convert(network()).eval()
    found = torch.func.functional_call(model, dict(model.state_dict()), X)
    torch.testing.assert_close(found, model(X))


def test_other_values_for_the_parameter_reach_the_forward():
    model = convert(network())
    changed = {"0.weight": model[0].weight.detach() * 3}
    bias = model[0].bias[:, None, None]
    tripled = torch.func.functional_call(model[0], {"weight": changed["0.weight"]}, X)
    torch.testing.assert_close(tripled - bias, 3 * (model[0](X) - bias))


def test_it_trains_in_stacked_ensembles_and_in_checkpoints():
    models = [convert(network()).eval() for _ in range(3)]
    state = torch.func.stack_module_state(models)
    stateless = copy.deepcopy(models[0]).to("meta")

    def forward(parameters, buffers):
        return torch.func.functional_call(stateless, (parameters, buffers), (X,))

    expected = torch.stack([model(X) for model in models])
    torch.testing.assert_close(torch.vmap(forward)(*state), expected)

    (layer, *_), (other, *_) = models[0], copy.deepcopy(models[0])
    checkpoint(layer, X, use_reentrant=False).square().sum().backward()
    other(X).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, other.weight.grad)
