"""A new user's mistakes: each message says what was expected, what came, and the remedy."""

import copy
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import bnstats
import cases
from bnstats.errors import BnstatsWarning, InvalidTypeError, InvalidValueError
from networks import assert_untouched, snapshot


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def images(count=3):
    return [torch.randn(4, 3, 8, 8) for _ in range(count)]


recompute, convert = bnstats.recompute_population_stats, bnstats.convert_batchnorm


def recorded(*arguments):
    with bnstats.record_batch_stats(*arguments):
        pass


SWAPPED = {
    "recompute": (recompute, (images(), network()), "list", "(model, loader)"),
    "measure": (
        bnstats.measure_population_stats, (images(), network()), "list", "(model, loader)"
    ),
    "convert": (convert, ("ema", network()), "str", "(model, to)"),
    "diagnose": (bnstats.diagnose, (images(), network()), "list", "(model, loader)"),
    "masked": (
        lambda *arguments: bnstats.masked(*arguments).__enter__(),
        (torch.ones(4, 6, 6).bool(), network()), "Tensor", "(model, mask)",
    ),
    "record": (recorded, (["1"], network()), "list", "(model, layers)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "arguments", "came", "order"), SWAPPED.values(), ids=SWAPPED)
def test_swapped_arguments_are_recognized(call, arguments, came, order):
    says = f"expected a torch.nn.Module, got {came}: the arguments are swapped, pass {order}"
    with pytest.raises(InvalidTypeError, match=re.escape(says)):
        call(*arguments)


NO_MODELS = {
    "a state dict": (network().state_dict(), "OrderedDict, a state dict: load it into a model"),
    "a class": (nn.BatchNorm2d, r"the class BatchNorm2d: pass a model, BatchNorm2d\(...\)"),
    "a function": (network, "function network: call it"),
    "a path": ("model.pt", "str, a path: build the model and load the checkpoint into it"),
    "nothing": (None, "NoneType"),
}


@pytest.mark.parametrize(("model", "says"), NO_MODELS.values(), ids=NO_MODELS)
def test_what_is_no_model_is_told_how_to_become_one(model, says):
    stats = bnstats.measure_population_stats(network(), images())
    calls = [
        lambda: recompute(model, images()),
        lambda: convert(model, "ema"),
        lambda: bnstats.revert_batchnorm(model),
        lambda: stats.apply_to(model),
        lambda: stats.drift_from(model),
        lambda: recorded(model),
    ]
    for call in calls:
        with pytest.raises(
            InvalidTypeError, match=f"model: expected a torch.nn.Module, got {says}"
        ):
            call()


def one_name(name):
    return True


CHOOSING = (
    bnstats.hold_statistics,
    bnstats.freeze_statistics,
    bnstats.thaw_statistics,
    lambda model, include: bnstats.observe(model, include).__enter__(),
)

NO_INCLUDES = {
    "a list": (["1"], r"got list; for names use lambda name, module: name.startswith\(\('1',\)\)"),
    "a name": ("1", r"got str; for names use lambda name, module: name.startswith\('1'\)"),
    "a class": (
        nn.BatchNorm2d,
        r"got the class BatchNorm2d; .* lambda name, module: isinstance\(module, BatchNorm2d\)",
    ),
    "one parameter": (one_name, r"got one_name\(name\): too many positional arguments"),
    "three": (lambda a, b, c: True, r"got <lambda>\(a, b, c\): missing a required argument: 'c'"),
}


@pytest.mark.parametrize(("include", "says"), NO_INCLUDES.values(), ids=NO_INCLUDES)
def test_an_include_that_cannot_choose_says_what_can_before_anything_runs(include, says):
    model = network()
    before = snapshot(model)
    says = r"include: expected a function include\(name, module\) or None, " + says
    for call in (
        partial(recompute, model, images()),
        partial(convert, model, "ema"),
        *(partial(function, model) for function in CHOOSING),
    ):
        with pytest.raises(InvalidTypeError, match=says):
            call(include=include)
    assert_untouched(model, before)


def test_the_include_that_the_message_shows_works():
    model = nn.Sequential(network(), network())
    for names in ("1", ("1",)):
        chosen = eval(f"lambda name, module: name.startswith({names!r})")
        measured = bnstats.measure_population_stats(network(), images(), include=chosen)
        assert [*measured] == ["1"]
    convert(model, "ema", include=lambda name, module: name.startswith("1"))
    assert [type(model[i][1]).__name__ for i in (0, 1)] == ["BatchNorm2d", "EMABatchNorm2d"]


def test_a_forward_takes_the_model_and_the_batch():
    says = r"forward: expected a function forward\(model, batch\) or None, got <lambda>\(batch\)"
    with pytest.raises(InvalidTypeError, match=says):
        recompute(network(), images(), forward=lambda batch: None)


def test_a_model_in_the_place_of_a_forward_is_told_what_a_forward_does():
    model = network()
    says = r"forward\(model, batch\) or None, got Sequential\(input\): .*: leave it out, or pass"
    for function in (recompute, bnstats.measure_population_stats, bnstats.diagnose):
        with pytest.raises(InvalidTypeError, match=says):
            function(model, images(), forward=model)


class Both(nn.Module):
    def forward(self, model, batch):
        return model(batch)


def test_a_module_that_takes_the_model_and_the_batch_is_a_forward():
    assert recompute(network(), images(), forward=Both()).after["1"].num_batches == 3


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ["cpu"]], ids=str)
def test_a_device_that_torch_does_not_know_is_named(device):
    for function in (recompute, bnstats.measure_population_stats, bnstats.diagnose):
        with pytest.raises(InvalidValueError, match=r"device: expected .*\"cuda:0\".*, got "):
            function(network(), images(), device=device)


def test_a_way_to_downsample_without_a_mask_is_refused():
    for function in (recompute, bnstats.measure_population_stats):
        with pytest.raises(InvalidValueError, match="downsample: expected None without a mask"):
            function(network(), images(), downsample="any")


def test_a_path_is_a_string_or_a_path():
    stats = bnstats.measure_population_stats(network(), images())
    for call in (stats.save, bnstats.PopulationStats.load):
        with pytest.raises(InvalidTypeError, match="path: expected a str or a path, got int"):
            call(3)


def test_how_many_layers_to_draw_is_an_integer_or_none():
    result = recompute(network(), images())
    with pytest.raises(InvalidTypeError, match="worst: expected an int or None, got str"):
        bnstats.plot_drift(result, worst="all")
    with pytest.raises(InvalidValueError, match="worst: expected 1 or more, got 0"):
        bnstats.plot_drift(result, worst=0)


def test_a_number_of_features_is_an_integer():
    for number in ("a", 2.0, True):
        with pytest.raises(InvalidTypeError, match="num_features: expected an int, got"):
            bnstats.Moments.empty(number)


@pytest.mark.parametrize("copying", [pickle.dumps, copy.deepcopy, copy.copy])
def test_an_observation_is_not_copied_and_its_statistics_are(copying):
    model = network()
    with bnstats.observe(model) as seen:
        model(images()[0])
        with pytest.raises(InvalidTypeError, match=r"Observation: .* seen\.stats\(\)"):
            copying(seen)
        assert copying(seen.stats())
        assert copying(model)


@pytest.mark.parametrize(
    "function",
    [lambda *args: True, lambda name, module=None: True, partial(max, 0, key=str), isinstance],
    ids=["variadic", "default", "partial", "builtin"],
)
def test_functions_that_take_the_arguments_are_not_refused(function):
    from bnstats.arguments import check_function

    check_function("include", function, "name, module")


def test_a_result_in_the_place_of_its_statistics_is_told_where_they_are():
    result = recompute(network(), images())
    for call in (bnstats.estimate_running_error, result.after.merge):
        with pytest.raises(InvalidTypeError, match=r"got Recalibration; .* are result.after"):
            call(result)
    with pytest.raises(InvalidTypeError, match=r"got Recalibration; measure_population_stats\("):
        recompute(network(), images(), prior=result)


def test_arrays_are_told_how_to_become_tensors():
    last = [x.movedim(1, -1).numpy() for x in images()]
    for loader in (last, [(x, 1) for x in last]):
        with pytest.raises(InvalidTypeError, match=r"from_numpy\(batch\).* pass x.movedim\(-1, 1"):
            recompute(network(), loader)
    with pytest.raises(InvalidTypeError, match=r"got ndarray; torch.from_numpy\(x\) is one"):
        bnstats.Moments.from_batch(last[0])


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="notes are of Python 3.11")
@pytest.mark.parametrize("model", [network(), nn.BatchNorm2d(3)], ids=["convolution", "batch norm"])
def test_channels_in_the_last_axis_are_recognized_by_the_models_error(model):
    with pytest.raises(RuntimeError) as caught:
        recompute(model, [x.movedim(1, -1) for x in images()])
    assert (
        "if the channels are in the last axis, pass x.movedim(-1, 1)" in caught.value.__notes__[0]
    )


@cases.each_family
def test_channels_in_the_last_axis_are_recognized_by_layers(family):
    layer = family.make(2)
    with pytest.raises(InvalidValueError, match=r"shape \(4, 5, 6, 3\); if the channels .* last"):
        layer(torch.randn(4, 5, 6, 3))
    with pytest.raises(InvalidValueError, match=r"shape \(4, 5, 6, 7\)$"):
        layer(torch.randn(4, 5, 6, 7))


@pytest.mark.parametrize("error", [FileNotFoundError, NotADirectoryError])
def test_a_file_that_cannot_be_written_is_named_as_the_caller_named_it(error, tmp_path):
    stats = bnstats.measure_population_stats(network(), images())
    folder = tmp_path / "folder"
    if error is NotADirectoryError:
        folder.touch()
    with pytest.raises(error, match=r"to write stats.npz into: '.*folder'") as caught:
        stats.save(folder / "stats.npz")
    assert ".part" not in str(caught.value)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    stats = bnstats.measure_population_stats(network(), images())
    with pytest.raises(IsADirectoryError, match=f"got a folder: '{tmp_path}'"):
        stats.save(tmp_path)


def test_a_class_in_the_place_of_a_family_is_told_the_familys_name():
    with pytest.raises(InvalidTypeError, match=r"the class EMABatchNorm2d: pass 'ema'$"):
        convert(network(), bnstats.EMABatchNorm2d)
    with pytest.raises(InvalidTypeError, match=r"got the class BatchNorm2d$"):
        convert(network(), nn.BatchNorm2d)


def test_a_diagnosis_names_the_argument_that_is_wrong():
    says = r"target: expected an iterable of batches.*got Tensor"
    with pytest.raises(InvalidTypeError, match=says):
        bnstats.diagnose(network(), images(), target=images()[0])
    says = r"metric: expected a function metric\(model, batch\) or None, got <lambda>\(model\)"
    with pytest.raises(InvalidTypeError, match=says):
        bnstats.diagnose(network(), images(), metric=lambda model: 1)


def test_a_limit_in_the_notation_of_floats_is_told_how_to_be_an_integer():
    with pytest.raises(InvalidTypeError, match=r"got float, pass int\(4e\+09\)$"):
        recompute(network(), images(), method="layerwise", memory_limit=4e9)


def test_a_model_without_values_is_refused_and_told_how_to_get_them():
    stats = bnstats.measure_population_stats(network(), images())
    with torch.device("meta"):
        empty = network()
    calls = [lambda: recompute(empty, images()), lambda: stats.apply_to(empty)]
    calls += [lambda: bnstats.diagnose(empty, images()), lambda: bnstats.observe(empty)]
    for call in [*calls, lambda: stats.drift_from(empty)]:
        says = r"layer '1' \(BatchNorm2d\): .* got tensors on the meta device: model.to_empty"
        with pytest.raises(InvalidValueError, match=says):  # copying into them would do nothing
            call()
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(network().state_dict())
    assert stats.drift_from(filled)


def test_offloaded_parameters_are_no_reason_to_refuse():
    # accelerate's cpu_offload keeps them on meta, and brings them for each forward.
    model = network()
    weight, bias = model[0].weight, model[0].bias
    model[0].weight, model[0].bias = (nn.Parameter(x.to("meta")) for x in (weight, bias))

    def bring(module, _):
        module.weight, module.bias = weight, bias

    model[0].register_forward_pre_hook(bring)
    assert recompute(model, images(), device="cpu").after["1"].count == 3 * 4 * 6 * 6


KERAS = "momentum=0.99 weighs the new batch by 0.99 .* 0.99 there is 0.01 here"


@cases.each_family
def test_a_momentum_above_a_half_is_warned_of(family):
    for cls in (family.base, *family.layers.values()):
        with pytest.warns(BnstatsWarning, match=f"^{cls.__name__}: {KERAS}"):
            cls(3, momentum=0.99)


@cases.each_family
def test_a_conversion_warns_once_of_a_momentum_that_it_was_given_and_never_of_the_layers_own(
    family,
):
    model = nn.Sequential(*(nn.BatchNorm2d(3, momentum=0.9) for _ in range(3)))
    convert(model, family.name)
    assert {layer.momentum for layer in model} == {0.9}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(model, family.name, momentum=0.99)
    (warning,) = caught
    assert re.search(KERAS, str(warning.message))
    assert warning.filename == __file__
    assert {layer.momentum for layer in model} == {0.99}
    bnstats.revert_batchnorm(model)
    assert {layer.momentum for layer in model} == {0.99}


@cases.each_family
@pytest.mark.parametrize("momentum", [1, 1.0])
def test_a_momentum_of_one_is_warned_of_where_a_user_passes_it(family, momentum):
    # In Keras statistics would never move with it; here nothing else stays.
    says = "momentum=1 keeps the statistics of the latest batch alone.*momentum=0 leaves them"
    for cls in (family.base, *family.layers.values()):
        with pytest.warns(BnstatsWarning, match=f"^{cls.__name__}: {says}"):
            cls(3, momentum=momentum)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    with pytest.warns(BnstatsWarning, match=says) as caught:
        convert(model, family.name, momentum=momentum)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    convert(nn.BatchNorm2d(3, momentum=momentum), family.name)  # the layer's own: no warning


@cases.each_family
@pytest.mark.parametrize("momentum", [None, 0, 0.02, 0.5])
def test_other_values_of_momentum_are_not_warned_of(family, momentum):
    family.make(2, momentum=momentum)  # warnings are errors here


@cases.each_family
def test_a_momentum_that_is_set_later_is_not_warned_of(family):
    # fvcore's update_bn_stats sets 1.0, torch's update_bn None.
    layer = family.make(1)
    for momentum in (1.0, 0.9, None):
        layer.momentum = momentum
        layer(torch.randn(8, 3))


def test_an_estimate_for_a_momentum_above_a_half_warns_too():
    stats = bnstats.measure_population_stats(network(), images())
    with pytest.warns(BnstatsWarning, match=KERAS):
        bnstats.estimate_running_error(stats, momentum=0.99)
    (error,) = bnstats.estimate_running_error(stats, momentum=1).values()
    assert error.effective_batches == 1


def test_a_mistyped_option_is_answered_with_the_nearest():
    with pytest.raises(
        InvalidTypeError, match=r"windw: .* no such option, the nearest is 'window'"
    ):
        convert(network(), "moving_average", windw=16)


@pytest.mark.parametrize("method", [3, ["pooled"], "layer_wise"])
def test_what_is_no_method_is_answered_with_all_of_them(method):
    says = f"expected one of pooled, .*, sweeps, got {re.escape(repr(method))}"
    with pytest.raises(InvalidValueError, match=says):
        recompute(network(), images(), method=method)


def test_a_loader_that_has_to_be_called_is_told_so():
    with pytest.raises(InvalidTypeError, match=r"loader: .* got function; call it"):
        recompute(network(), images)
    with pytest.raises(InvalidTypeError, match=r"got Tensor; one batch .* \[batch\]"):
        recompute(network(), images()[0])


def test_statistics_that_are_parameters_are_refused_by_their_layer():
    layer = nn.BatchNorm1d(3)
    for name in ("running_mean", "running_var"):
        value = getattr(layer, name)
        delattr(layer, name)
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
    model, data = nn.Sequential(layer), [torch.randn(8, 3)]
    for call in (
        partial(recompute, model, data),
        partial(bnstats.diagnose, model, data),
        partial(bnstats.hold_statistics, model),
        partial(convert, model, "ema"),
    ):
        with pytest.raises(InvalidTypeError, match=r"layer '0' .*buffers, got parameters"):
            call()
