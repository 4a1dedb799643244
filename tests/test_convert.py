"""convert_batchnorm and revert_batchnorm: what changes, what does not, what is refused."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import bnstats
from cases import FAMILIES, PLAIN, SHAPES

pytestmark = pytest.mark.filterwarnings(
    # Asked for by its own test, beside the others' way.
    "ignore:the model will evaluate differently:bnstats.BnstatsWarning",
    "ignore:.*the checkpoint's running_mean is not near zero:bnstats.BnstatsWarning",
)

SAME_OUTPUT = [f for f in FAMILIES if f.name in ("ema", "cumulative")]

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
normalizing = pytest.mark.parametrize("family", SAME_OUTPUT, ids=lambda f: f.name)
shapes = pytest.mark.parametrize(("dims", "shape"), SHAPES.values(), ids=SHAPES)


def trained(layer, shape=(4, 3, 5, 6), steps=3):
    """A layer whose parameters and running statistics are not the initial ones."""
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    for _ in range(steps):
        layer(torch.randn(shape) + 1)
    return layer


def convnet():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    )
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8) + 1)
    return model


def converted(model, family, **options):
    return bnstats.convert_batchnorm(model, family.name, **options)


def snapshot(model):
    """All that a module is: classes, attributes, tensors, in order."""
    return [
        (name, type(module), list(vars(module)), [*module._buffers], [*module._parameters])
        for name, module in model.named_modules()
    ], {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, before):
    structure, state = snapshot(model)
    assert structure == before[0]
    assert list(state) == list(before[1])
    for key, value in state.items():
        torch.testing.assert_close(value, before[1][key], rtol=0, atol=0, equal_nan=True)


# What changes


@families
@shapes
def test_a_layer_becomes_the_familys_of_its_dimension_and_comes_back(family, dims, shape):
    model = nn.Sequential(PLAIN[dims](3))
    assert type(converted(model, family)[0]) is family.layers[dims]
    assert model(torch.randn(shape)).shape == shape
    assert type(bnstats.revert_batchnorm(model)[0]) is PLAIN[dims]


@families
def test_sync_batchnorm_becomes_the_familys_base_and_comes_back(family):
    model = nn.Sequential(nn.SyncBatchNorm(3))
    assert type(converted(model, family)[0]) is family.base
    assert model[0].sync is True
    assert model(torch.randn(4, 3)).shape == (4, 3)
    assert model(torch.randn(2, 3, 4, 4, 4)).shape == (2, 3, 4, 4, 4)
    assert type(bnstats.revert_batchnorm(model)[0]) is nn.SyncBatchNorm
    assert model[0].process_group is None


@families
def test_a_familys_base_becomes_sync_batchnorm(family):
    layer = bnstats.revert_batchnorm(family.base(3))
    assert type(layer) is nn.SyncBatchNorm
    assert layer.process_group is None


@families
@pytest.mark.parametrize("other", FAMILIES, ids=lambda f: f.name)
def test_a_family_becomes_another_and_leaves_nothing_behind(family, other):
    model = nn.Sequential(family.make(2))
    converted(model, other)
    built = other.make(2)
    assert type(model[0]) is type(built)
    assert vars(model[0]).keys() == vars(built).keys()
    assert list(model[0].state_dict()) == list(built.state_dict())


@families
def test_the_way_back_leaves_nothing_behind(family):
    model = convnet()
    structure, state = snapshot(model)
    bnstats.revert_batchnorm(converted(model, family))
    if family.batch_statistics:
        assert_same(model, (structure, state))
    assert snapshot(model)[0] == structure


# What does not change


@normalizing
@shapes
def test_evaluation_is_bit_equal_there_and_back(family, dims, shape):
    model = nn.Sequential(trained(PLAIN[dims](3), shape)).eval()
    x = torch.randn(shape)
    expected = model(x)
    assert torch.equal(converted(model, family)(x), expected)
    assert torch.equal(bnstats.revert_batchnorm(model)(x), expected)


@families
def test_parameters_and_buffers_are_the_same_objects_in_the_same_order(family):
    model = convnet()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    keys = list(model.state_dict())
    for change in (lambda m: converted(m, family), bnstats.revert_batchnorm):
        change(model)
        assert [*dict(model.named_parameters())] == [*parameters]
        assert all(p is parameters[name] for name, p in model.named_parameters())
        now = dict(model.named_buffers())
        assert all(now[name] is buffer for name, buffer in buffers.items())
    assert list(model.state_dict()) == keys


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_requires_grad_are_kept(family, dtype):
    model = convnet().to(dtype)
    model[1].weight.requires_grad_(False)
    converted(model, family)
    assert model[1].weight.requires_grad is False
    assert model[1].bias.requires_grad is True
    assert model[1].running_var.dtype == dtype
    assert model[1].num_batches_tracked.dtype == torch.int64


@families
def test_a_model_without_storage_converts(family):
    model = converted(convnet().to("meta"), family)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@families
def test_a_model_on_a_device_stays_there(family, device):
    model = converted(convnet().to(device), family)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device.type}
    model(torch.randn(2, 3, 8, 8).to(device)).sum().backward()


@families
def test_eps_and_momentum_are_kept(family):
    layer = converted(nn.BatchNorm2d(3, eps=0.01, momentum=0.3), family)
    assert (layer.eps, layer.momentum) == (0.01, 0.3)
    bnstats.revert_batchnorm(layer)
    assert (layer.eps, layer.momentum) == (0.01, 0.3)


@normalizing
def test_momentum_none_is_kept(family):
    layer = converted(nn.BatchNorm2d(3, momentum=None), family)
    assert layer.momentum is None
    layer(torch.randn(2, 3, 4, 4))


@families
def test_every_modules_training_flag_is_kept(family):
    # timm#2422, mmengine#1624: converters that put frozen layers back into training mode
    model = convnet().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    for change in (lambda m: converted(m, family), bnstats.revert_batchnorm):
        assert [module.training for module in change(model).modules()] == flags


@families
def test_affine_false_stays_without_parameters(family):
    model = converted(nn.Sequential(nn.BatchNorm2d(3, affine=False)), family)
    assert list(model.parameters()) == []
    assert model[0].affine is False
    model(torch.randn(2, 3, 4, 4))


@families
def test_a_layer_with_a_weight_and_no_bias_stays_so(family):
    layer = nn.BatchNorm2d(3)
    layer.bias = None  # what torch 2.13 calls bias=False
    model = converted(nn.Sequential(layer), family)
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    model(torch.randn(2, 3, 4, 4)).sum().backward()


@normalizing
def test_a_layer_without_running_statistics_stays_so(family):
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    converted(model, family)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert torch.equal(model(x), expected)
    assert model.train()(x).isfinite().all()
    assert list(bnstats.revert_batchnorm(model).state_dict()) == ["0.weight", "0.bias"]


def all_hooks(module, calls):
    """One hook of every kind, which append their kind to ``calls``; their handles."""
    mark = lambda kind: lambda *args, **kwargs: calls.append(kind)  # noqa: E731
    return [
        module.register_forward_pre_hook(mark("pre")),
        module.register_forward_pre_hook(mark("pre, kwargs"), with_kwargs=True),
        module.register_forward_hook(mark("forward")),
        module.register_forward_hook(mark("forward, kwargs"), with_kwargs=True),
        module.register_forward_hook(mark("forward, always"), always_call=True),
        module.register_full_backward_pre_hook(mark("backward pre")),
        module.register_full_backward_hook(mark("backward")),
        module.register_state_dict_pre_hook(mark("state pre")),
        module.register_state_dict_post_hook(mark("state post")),
        module.register_load_state_dict_pre_hook(mark("load pre")),
        module.register_load_state_dict_post_hook(mark("load post")),
    ]


def run_all(model):
    model(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())


@families
def test_hooks_of_every_kind_are_called_as_before_and_their_handles_remove_them(family):
    calls: list[str] = []
    model = nn.Sequential(nn.BatchNorm2d(3))
    handles = all_hooks(model[0], calls)
    run_all(model)
    expected = calls.copy()
    assert len(set(expected)) == len(handles)
    for change in (lambda m: converted(m, family), bnstats.revert_batchnorm):
        change(model)
        gc.collect()  # torch's load hooks hold their module weakly
        calls.clear()
        run_all(model)
        assert calls == expected
    for handle in handles:
        handle.remove()
    calls.clear()
    run_all(model)
    assert calls == []


@families
def test_a_hook_gets_the_layer_that_it_was_registered_on(family):
    seen = []
    layer = nn.BatchNorm2d(3)
    layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model = converted(nn.Sequential(layer), family)
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]


@families
def test_attributes_that_somebody_put_on_a_layer_stay(family):
    layer = nn.BatchNorm2d(3)
    layer.note, layer.child = "mine", nn.ReLU()
    converted(layer, family)
    assert layer.note == "mine"
    assert isinstance(bnstats.revert_batchnorm(layer).child, nn.ReLU)


class Double(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


@families
def test_parametrizations_stay_and_come_off_again(family):
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Double())
    twin = copy.deepcopy(layer)
    converted(layer, family)
    assert isinstance(layer, family.layers[2])
    assert parametrize.is_parametrized(layer, "weight")
    assert torch.equal(layer.weight, torch.ones(3))
    layer(torch.randn(2, 3, 4, 4)).sum().backward()
    # torch lets copies share their class: it must not have changed.
    assert not isinstance(twin, family.base)
    bnstats.revert_batchnorm(converted(twin, family))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is family.layers[2]
    parametrize.remove_parametrizations(twin, "weight")
    assert type(twin) is nn.BatchNorm2d


# Sharing, roots, wrappers


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.second = self.first
        self.inner = nn.Sequential(self.first, nn.ReLU(), self.first)
        self.unregistered = [self.first]

    def forward(self, x):
        return self.inner(self.second(self.first(x)))


@families
def test_a_layer_that_is_used_twice_stays_one_layer(family):
    # torch's SyncBatchNorm.convert_sync_batchnorm makes one of every place: see below.
    model = converted(Shared(), family)
    places = [model.first, model.second, model.inner[0], model.inner[2], model.unregistered[0]]
    assert all(place is model.first for place in places)
    assert type(model.first) is family.layers[2]
    model(torch.randn(2, 3, 4, 4))
    assert model.first.num_batches_tracked == 4


def test_torchs_own_converter_unties_shared_layers():
    # The reason for the promise above; should torch learn to keep them, this notices.
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Shared())
    assert model.first is not model.inner[0]


@families
def test_a_model_that_is_a_batchnorm_is_converted(family):
    layer = nn.BatchNorm2d(3)
    assert converted(layer, family) is layer
    assert type(layer) is family.layers[2]
    assert type(bnstats.revert_batchnorm(layer)) is nn.BatchNorm2d


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
}


@families
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_seen_through_and_include_gets_the_unwrapped_names(family, wrap):
    names = []
    wrapped = wrap(convnet())
    converted(wrapped, family, include=lambda name, module: not names.append(name))
    assert [name for name in names if name in ("1", "4")] == ["1", "4"]
    assert not any("module" in name or "_orig_mod" in name for name in names)
    kinds = [type(module) for module in wrapped.modules()]
    assert kinds.count(family.layers[2]) == 2


@families
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_notices_the_conversion(family):
    torch.compiler.reset()  # torch 2.6 compiles a forward 8 times at most; other tests do too
    model = nn.Sequential(nn.BatchNorm2d(3))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(4, 3, 5, 5) + 3
    compiled(x)
    converted(model, family, momentum=0.5)
    reference = copy.deepcopy(model)
    compiled(x)
    reference(x)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    bnstats.revert_batchnorm(model).eval()
    torch.testing.assert_close(compiled(x), model(x))


# Options


def test_options_reach_the_layers():
    layer = bnstats.convert_batchnorm(nn.BatchNorm1d(3), "ema", debias=False, momentum=0.5)
    assert (layer.debias, layer.pooled, layer.momentum) == (False, True, 0.5)


@families
def test_converting_twice_is_converting_once(family):
    model = converted(convnet(), family)
    model(torch.randn(4, 3, 8, 8))
    before = snapshot(model)
    buffers = dict(model.named_buffers())
    assert_same(converted(model, family), before)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def test_converting_again_takes_the_options_and_keeps_the_state():
    layer = bnstats.convert_batchnorm(nn.BatchNorm1d(3), "ema", debias=False)
    layer(torch.randn(8, 3))
    state = copy.deepcopy(layer.state_dict())
    bnstats.convert_batchnorm(layer, "ema", pooled=False)
    assert (layer.debias, layer.pooled) == (True, False)
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)


def test_include_chooses_layers_by_name_and_module():
    model = convnet()
    bnstats.convert_batchnorm(model, "ema", include=lambda name, module: name == "4")
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[4]) is bnstats.EMABatchNorm2d


# What the statistics go on from


def test_statistics_that_no_batch_was_counted_for_are_not_thrown_away():
    # torchvision's first ImageNet checkpoints are such: nn.BatchNorm loads them with a count of 0
    layer = nn.BatchNorm1d(2)
    layer.running_mean.fill_(5.0)
    bnstats.convert_batchnorm(layer, "ema")
    layer(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 4.5))


def test_initial_statistics_do_not_count():
    layer = bnstats.convert_batchnorm(nn.BatchNorm1d(2), "ema")
    assert layer.num_batches_tracked == 0
    layer(torch.tensor([[3.0, 3.0], [5.0, 5.0]]))
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 4.0))


@pytest.mark.parametrize("options", [{"debias": False}, {"momentum": None}, {"momentum": 0}])
def test_the_count_stays_where_nothing_is_debiased(options):
    layer = nn.BatchNorm1d(2)
    layer.running_mean.fill_(5.0)
    bnstats.convert_batchnorm(layer, "ema", **options)
    assert layer.num_batches_tracked == 0


def test_cumulative_statistics_start_with_the_first_training_batch():
    layer = bnstats.convert_batchnorm(trained(nn.BatchNorm1d(3), (8, 3)), "cumulative")
    assert layer.num_values_tracked == 0
    x = torch.randn(8, 3)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))


@families
def test_a_converted_model_loads_the_plain_models_checkpoint(family):
    checkpoint = convnet().state_dict()
    model = converted(convnet(), family)
    model.load_state_dict(checkpoint, strict=True)
    if family.batch_statistics:
        assert torch.equal(model[1].running_var, checkpoint["1.running_var"])


# After it: copies, pickles


@families
def test_copies_and_pickles_of_a_converted_model_are_equal(family):
    model = converted(convnet(), family)
    model(torch.randn(4, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin.eval()(x), model.eval()(x))
        assert type(twin[1]) is family.layers[2]
