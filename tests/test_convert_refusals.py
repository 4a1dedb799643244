"""What convert_batchnorm and revert_batchnorm refuse, warn of, and leave as it was."""

import importlib
from typing import Generic, TypeVar

import pytest
import torch
from torch import nn

import bnstats
from bnstats.errors import BnstatsError, InvalidTypeError, InvalidValueError
from cases import FAMILIES

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


def two_layers():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))


def state(model):
    """All that a model is: classes, attributes and tensors, and how often those were written."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        (type(module), {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ], [(id(tensor), tensor._version) for tensor in tensors]


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Renaming(nn.BatchNorm2d):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, f"{prefix}renamed_", keep_vars)


class Doubling(nn.Conv2d):
    @property
    def weight(self):
        return 2 * self._parameters["weight"] if "weight" in self._parameters else self.missing


class Scheduled(nn.BatchNorm2d):
    @property
    def momentum(self):
        return 0.5

    @momentum.setter
    def momentum(self, value):
        pass


T = TypeVar("T")


class Helpful(nn.BatchNorm2d, Generic[T]):
    @staticmethod
    def helper():
        return 1

    def extra_repr(self):
        return "helpful"


class Slotted(nn.BatchNorm2d):
    __slots__ = ("own",)


class GenericFirst(Generic[T], nn.BatchNorm2d):
    pass


class Thin(nn.BatchNorm2d):
    """Other defaults, and nothing else."""

    def __init__(self, num_features):
        super().__init__(num_features, eps=1e-3)


class Dimensionless(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input):
        pass


def instance_forward():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: nn.BatchNorm2d.forward(layer, x).relu()
    return layer


REFUSED = {
    "own forward": (lambda: Activated(3), "forward"),
    "own method behind state dicts": (lambda: Renaming(3), "_save_to_state_dict"),
    "own option": (lambda: Scheduled(3), "momentum"),
    "slots": (lambda: Slotted(3), "__slots__"),
    "another layout": (lambda: GenericFirst(3), "Generic"),
    "no dimension": (lambda: Dimensionless(3), "no known base"),
    "forward put on the layer": (instance_forward, "forward"),
    "lazy": (nn.LazyBatchNorm2d, "lazy"),
    "eps 0": (lambda: nn.BatchNorm2d(3, eps=0.0), "eps"),
    "momentum 2": (lambda: nn.BatchNorm2d(3, momentum=2.0), "momentum"),
}


@families
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("make", "word"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_is_refused_by_path_and_nothing_changes(family, make, word):
    # pytorch#187298: torch's converter silently drops what a subclass does in its forward
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(), make()))
    before = state(model)
    with pytest.raises(BnstatsError, match=rf"'1\.1'.*{word}"):
        bnstats.convert_batchnorm(model, family.name)
    assert state(model) == before

    bnstats.convert_batchnorm(model, family.name, include=lambda name, module: name != "1.1")
    assert type(model[0]) is family.layers[2]
    bnstats.revert_batchnorm(model)
    assert state(model)[0] == before[0]


def test_a_convolution_that_computes_its_weight_is_not_centered():
    model = nn.Sequential(Doubling(3, 3, 1), nn.BatchNorm2d(3))
    before = state(model)
    with pytest.raises(InvalidTypeError, match=r"'0' \(Doubling\).*its own weight.*center=False"):
        bnstats.convert_batchnorm(model, "moving_average")
    assert state(model) == before


@families
def test_a_subclass_that_adds_a_constructor_only_is_converted(family):
    layer = bnstats.convert_batchnorm(Thin(3), family.name)
    assert type(layer) is family.layers[2]
    assert layer.eps == 1e-3


def test_the_way_back_refuses_a_subclass_of_a_family_too():
    class Own(bnstats.EMABatchNorm2d):
        def forward(self, x):
            return -super().forward(x)

    model = nn.Sequential(bnstats.EMABatchNorm2d(3), Own(3))
    with pytest.raises(InvalidTypeError, match=r"'1' \(Own\).*forward"):
        bnstats.revert_batchnorm(model)
    assert type(model[0]) is bnstats.EMABatchNorm2d
    # It is of the family: there it may stay.
    bnstats.convert_batchnorm(model, "ema", pooled=False)
    assert type(model[1]) is Own
    assert model[1].pooled is False


@families
def test_a_layer_that_cannot_be_written_to_is_refused(family):
    with torch.inference_mode():
        model = two_layers()
    before = [type(module) for module in model.modules()]
    with pytest.raises(InvalidValueError, match=r"'1'.*inference_mode"):
        bnstats.convert_batchnorm(model, family.name)
    assert [type(module) for module in model.modules()] == before
    with torch.inference_mode():
        bnstats.revert_batchnorm(bnstats.convert_batchnorm(model, family.name))


class Speaking(Activated):
    @classmethod
    def __bnstats_class__(cls, to):
        return {"ema": SpeakingEMA, "plain": Speaking, "cumulative": nn.BatchNorm2d}.get(to)


class SpeakingEMA(Speaking, bnstats.EMABatchNorm2d):
    pass


def test_a_subclass_can_say_what_it_becomes():
    layer = Speaking(3)
    x = torch.randn(2, 3, 4, 4)
    layer(x)
    layer.eval()
    expected = layer(x)
    bnstats.convert_batchnorm(layer, "ema", pooled=False)
    assert type(layer) is SpeakingEMA
    assert (layer.debias, layer.pooled) == (True, False)
    assert torch.equal(layer(x), expected)
    layer.train()(x)
    assert type(bnstats.revert_batchnorm(layer)) is Speaking
    assert not hasattr(layer, "pooled")


def test_what_a_subclass_says_is_checked():
    with pytest.raises(InvalidTypeError, match=r"'0' \(Speaking\).*CumulativeBatchNorm2d"):
        bnstats.convert_batchnorm(nn.Sequential(Speaking(3)), "cumulative")


def test_a_subclass_that_says_nothing_for_a_family_is_refused():
    class Silent(Activated):
        @classmethod
        def __bnstats_class__(cls, to):
            return None

    with pytest.raises(InvalidTypeError, match="forward"):
        bnstats.convert_batchnorm(Silent(3), "ema")


BAD_ARGUMENTS = {
    "unknown family": (
        ("mean",),
        {},
        InvalidValueError,
        "'ema', 'cumulative', 'renorm', 'moving_average'.*'mean'",
    ),
    "the way back": (("plain",), {}, InvalidValueError, "revert_batchnorm"),
    "a class": ((bnstats.EMABatchNorm2d,), {}, InvalidTypeError, "to: expected one of"),
    "unknown option": (
        ("ema",),
        {"window": 3},
        InvalidTypeError,
        "window.*debias, pooled, sync, momentum",
    ),
    "center": (("cumulative",), {"center": True}, InvalidTypeError, "center"),
    "bad value": (("ema",), {"momentum": 7}, InvalidValueError, "momentum"),
    "include": (("ema",), {"include": "1"}, InvalidTypeError, "include: expected a function"),
}


@pytest.mark.parametrize(
    ("args", "options", "error", "words"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS
)
def test_bad_arguments_are_named_and_nothing_changes(args, options, error, words):
    model = two_layers()
    before = state(model)
    with pytest.raises(error, match=words):
        bnstats.convert_batchnorm(model, *args, **options)
    assert state(model) == before


@pytest.mark.parametrize("model", [None, "resnet50", nn.BatchNorm2d, [nn.BatchNorm2d(3)]])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(InvalidTypeError, match="model: expected a torch"):
        bnstats.convert_batchnorm(model, "ema")
    with pytest.raises(InvalidTypeError, match="model: expected a torch"):
        bnstats.revert_batchnorm(model)


def test_an_error_in_include_changes_nothing():
    model = two_layers()
    before = state(model)

    def include(name, module):
        if name == "3":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        bnstats.convert_batchnorm(model, "ema", include=include)
    assert state(model) == before


def test_nothing_to_convert_is_warned_of():
    with pytest.warns(bnstats.BnstatsWarning, match="Sequential has no BatchNorm layer"):
        bnstats.convert_batchnorm(nn.Sequential(nn.LayerNorm(3)), "ema")
    with pytest.warns(bnstats.BnstatsWarning, match="include"):
        bnstats.convert_batchnorm(two_layers(), "ema", include=lambda name, module: False)


def test_the_way_back_leaves_layers_of_others_alone():
    model = nn.Sequential(
        nn.BatchNorm2d(3), Activated(3), nn.InstanceNorm2d(3), nn.SyncBatchNorm(3)
    )
    before = state(model)
    assert state(bnstats.revert_batchnorm(model)) == before


@families
def test_helpers_beside_an_inherited_forward_are_no_reason_to_refuse(family):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Helpful(3)).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    bnstats.convert_batchnorm(model, family.name)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert type(model[1]) is not Helpful
    if family.name != "moving_average":
        torch.testing.assert_close(model(x), expected)
    bnstats.revert_batchnorm(model)
    assert type(model[1]) is Helpful


def test_torchvisions_video_models_convert_to_moving_averages():
    # Conv3DSimple has a static helper for its constructor's caller.
    video = importlib.import_module("torchvision.models.video")
    model = bnstats.convert_batchnorm(video.r3d_18(), "moving_average")
    classes = {type(module).__name__ for module in model.modules()}
    assert {"CenteredConv3d", "MovingAverageBatchNorm3d"} <= classes
    assert "Conv3DSimple" not in classes


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18"])
def test_torchvisions_video_models_train_and_come_back_to_their_own_classes(name):
    video = importlib.import_module("torchvision.models.video")
    model, x = getattr(video, name)(), torch.randn(2, 3, 4, 24, 24)
    before = [type(module) for module in model.modules()]
    bnstats.convert_batchnorm(model, "moving_average")
    bnstats.convert_batchnorm(model, "ema")  # through two families
    model.train()(x).square().mean().backward()
    bnstats.recompute_population_stats(model, [x])
    expected = model.eval()(x)
    torch.testing.assert_close(bnstats.revert_batchnorm(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert [type(module) for module in model.modules()] == before


@families
def test_a_class_that_was_remembered_is_not_kept_after_the_way_back(family):
    layer = Helpful(3)
    attributes = vars(layer).keys()
    bnstats.revert_batchnorm(bnstats.convert_batchnorm(nn.Sequential(layer), family.name))
    assert type(layer) is Helpful
    assert "plain_class" not in vars(layer)
    assert attributes <= vars(layer).keys()
    built = family.make(2)
    bnstats.revert_batchnorm(nn.Sequential(built))
    assert type(built) is nn.BatchNorm2d
