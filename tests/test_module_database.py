"""torch's own module database, with our classes in place of nn.BatchNorm1d, 2d and 3d.

The entries are those of ``torch.testing._internal.common_modules``, installed with torch; each
test stands for the one of the same name in torch's ``test/test_modules.py``.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db

from bnstats.errors import InvalidValueError
from cases import FAMILIES, PLAIN

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's database has a momentum that the layers warn of.
    pytest.mark.filterwarnings("ignore:.*weighs the new batch by:bnstats.errors.BnstatsWarning"),
]

NOT_TRACKING = "its windows are running statistics: track_running_stats=False is refused"
NO_DERIVATIVE = "its gradient is, on purpose, not the derivative of its output"
CONSTANTS = "its gradient takes r and d for constants, on purpose"
EPS_BELOW_ZERO = "eps below 0 is refused when the layer is made, not in its first forward"

WIDE = "a half layer's window, and the exact statistics of any, keep their digits"

DOES_NOT_APPLY = {
    ("cumulative", "every entry", "all buffers get the dtype"): WIDE,
    ("moving_average", "every entry", "all buffers get the dtype"): WIDE,
    ("moving_average", "not_tracking_stats", "every test"): NOT_TRACKING,
    ("moving_average", "every entry", "gradcheck in training"): NO_DERIVATIVE,
    ("moving_average", "every entry", "gradgradcheck in training"): NO_DERIVATIVE,
    ("renorm", "every entry", "gradcheck in training"): CONSTANTS,
    ("renorm", "every entry", "gradgradcheck in training"): CONSTANTS,
    ("every family", "negative eps", "errors"): EPS_BELOW_ZERO,
}

WIDE_DTYPES = (torch.float32, torch.float64)

ENTRIES = {
    dims: next(entry for entry in module_db if entry.module_cls is plain)
    for dims, plain in PLAIN.items()
}


def inputs(dims, training, dtype=torch.float32):
    entry = ENTRIES[dims]
    return entry.module_inputs_func(entry, "cpu", dtype, requires_grad=True, training=training)


def applies(family, module_input, test="every test"):
    keys = [(family.name, entry, test) for entry in (module_input.desc, "every entry")]
    return not {*keys, (family.name, module_input.desc, "every test")} & DOES_NOT_APPLY.keys()


def cases():
    for family in FAMILIES:
        for dims in PLAIN:
            for training in (True, False):
                for index, module_input in enumerate(inputs(dims, training)):
                    if applies(family, module_input):
                        mode = "training" if training else "evaluation"
                        name = f"{family.name}-{dims}d-{module_input.desc or 'plain'}-{mode}"
                        yield pytest.param(family, dims, training, index, id=name)


each_case = pytest.mark.parametrize(("family", "dims", "training", "index"), [*cases()])


def case(family, dims, training, index, dtype=torch.float32, plain=False):
    """The layer of a case, and its input."""
    module_input = list(inputs(dims, training, dtype))[index]
    cls = PLAIN[dims] if plain else family.layers[dims]
    options = module_input.constructor_input
    layer = cls(*options.args, **options.kwargs, dtype=dtype).train(training)
    (x,) = module_input.forward_input.args
    return layer, x


def backward(output, *parameters):
    return torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)


@each_case
def test_forward_and_repr(family, dims, training, index):
    layer, x = case(family, dims, training, index)
    output = layer(x)
    theirs = PLAIN[dims].__name__
    assert repr(layer).startswith(type(layer).__name__)
    assert theirs in repr(layer)
    plain, _ = case(family, dims, training, index, plain=True)
    if family.batch_statistics or not training:
        torch.testing.assert_close(output, plain(x))
    assert output.shape == x.shape


@each_case
def test_factory_kwargs(family, dims, training, index):
    for dtype in (torch.float32, torch.float64):
        layer, _ = case(family, dims, training, index, dtype)
        values = [*layer.parameters(), *layer.buffers()]
        plain, _ = case(family, dims, training, index, dtype, plain=True)
        for name, value in plain.state_dict().items():
            assert layer.state_dict()[name].dtype == value.dtype, name
        assert all(value.device.type == "cpu" for value in values)
    with torch.device("meta"):
        on_meta, _ = case(family, dims, training, index)
    assert all(value.is_meta for value in [*on_meta.parameters(), *on_meta.buffers()])
    on_meta.to_empty(device="cpu").load_state_dict(layer.state_dict())


@pytest.fixture(params=[False, True], ids=["set", "swap"])
def swapping(request):
    """Whether conversions swap parameters, as torch.__future__ lets them, or set their data."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def assert_dtype(family, module_input, layer, dtype):
    """The dtype is that of all parameters and buffers, or of those that torch's layer has."""
    wide = not applies(family, module_input, "all buffers get the dtype")
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        if value.is_floating_point() and not (wide and name in layer._wide_buffers):
            assert value.dtype == dtype, name
        elif value.is_floating_point():
            assert torch.finfo(value.dtype).eps <= torch.finfo(torch.float32).eps, name


@each_case
def test_to(family, dims, training, index, swapping):
    layer, x = case(family, dims, training, index)
    layer(x)
    twin, module_input = copy.deepcopy(layer), list(inputs(dims, training))[index]
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        assert layer.to(dtype) is layer
        assert_dtype(family, module_input, layer, dtype)
        assert torch.isfinite(layer(x.to(dtype))).all()
    twin.double()
    torch.testing.assert_close(twin(x.double()), copy.deepcopy(twin).to("cpu")(x.double()))
    with torch.no_grad():
        assert copy.deepcopy(twin).to("meta")(x.double().to("meta")).is_meta


@each_case
def test_to_empty_and_back(family, dims, training, index, swapping):
    layer, x = case(family, dims, training, index)
    layer(x)
    with torch.device("meta"):
        twin, _ = case(family, dims, training, index)
    assert all(value.is_meta for value in [*twin.parameters(), *twin.buffers()])
    twin.to_empty(device="cpu").load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin.state_dict(), layer.state_dict())
    torch.testing.assert_close(twin(x), layer(x))


@each_case
def test_save_and_load(family, dims, training, index):
    layer, x = case(family, dims, training, index)
    layer(x)
    for saved in (layer, layer.state_dict()):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        twin, _ = case(family, dims, training, index)
        loaded = torch.load(file, weights_only=saved is not layer)
        twin = loaded if saved is layer else (twin.load_state_dict(loaded), twin)[1]
        torch.testing.assert_close(twin(x), copy.deepcopy(layer)(x))


@each_case
def test_pickle_and_copy(family, dims, training, index):
    layer, x = case(family, dims, training, index)
    for clone in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(clone(x), twin(x))
        torch.testing.assert_close(clone.state_dict(), twin.state_dict())


@each_case
def test_non_contiguous_tensors(family, dims, training, index):
    layer, x = case(family, dims, training, index, torch.float64)
    other = copy.deepcopy(layer)
    strided = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
    strided = strided.copy_(x.detach()).requires_grad_()
    assert x.numel() == 0 or not strided.is_contiguous()
    a, b = layer(x), other(strided)
    torch.testing.assert_close(a, b)
    for mine, theirs in zip(
        backward(a, x, *layer.parameters()), backward(b, strided, *other.parameters()), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


# torch's own: forward mode loads decompositions that torch has deprecated
@each_case
def test_gradcheck_and_gradgradcheck(family, dims, training, index):
    layer, x = case(family, dims, training, index, torch.float64)
    if training and not family.batch_statistics:
        # verified below to be so
        assert (family.name, "every entry", "gradcheck in training") in DOES_NOT_APPLY
        return
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        twin = copy.deepcopy(layer)
        return torch.func.functional_call(twin, dict(zip(names, parameters, strict=True)), (x,))

    arguments = (x, *layer.parameters())
    assert gradcheck(function, arguments, check_forward_ad=x.numel() > 0, fast_mode=True)
    if x.numel():
        assert gradgradcheck(function, arguments, fast_mode=True)


@each_case
def test_memory_format(family, dims, training, index):
    layer, x = case(family, dims, training, index)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats or not x.numel():
        return
    other = copy.deepcopy(layer)
    plain, _ = case(family, dims, training, index, plain=True)
    y = x.detach().contiguous(memory_format=formats[x.dim()])
    output = other(y)
    torch.testing.assert_close(output, layer(x))
    assert output.is_contiguous(memory_format=formats[x.dim()]) == plain(y).is_contiguous(
        memory_format=formats[x.dim()]
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("dims", PLAIN)
def test_train_and_evaluation_modes_differ(family, dims):
    for index, module_input in enumerate(inputs(dims, training=True)):
        if applies(family, module_input) and module_input.desc not in (
            "zero_batch",
            "not_tracking_stats",
        ):
            layer, x = case(family, dims, True, index)
            layer(x * 3 + 1)  # an average over one batch alone would be that batch's
            assert not torch.allclose(layer(x), layer.eval()(x))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("dims", PLAIN)
def test_errors(family, dims):
    entry = ENTRIES[dims]
    if entry.module_error_inputs_func is None:
        pytest.skip("this torch's database has no wrong inputs")
    for error in entry.module_error_inputs_func(entry, "cpu", torch.float32, False, True):
        options = error.module_error_input.constructor_input
        (x,) = error.module_error_input.forward_input.args
        with pytest.raises((error.error_type, InvalidValueError)):
            family.layers[dims](*options.args, **options.kwargs)(x)


class TestWhatDoesNotApply:
    @pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
    def test_eps_below_zero_is_refused(self, family):
        with pytest.raises(InvalidValueError, match="eps"):
            family.make(1, eps=-1.0)

    def test_buffers_keep_their_digits_in_a_half_layer(self):
        for family in FAMILIES:
            halved = family.make(1).half()
            kept = {name for name, x in halved.named_buffers() if x.dtype in WIDE_DTYPES}
            assert kept == {*halved._wide_buffers}
            reason = DOES_NOT_APPLY.get((family.name, "every entry", "all buffers get the dtype"))
            assert bool(kept) == (reason is WIDE)

    def test_windows_need_running_statistics(self):
        with pytest.raises(InvalidValueError, match="track_running_stats"):
            FAMILIES[2].make(1, track_running_stats=False)

    def test_its_gradient_is_not_the_derivative_of_its_output(self):
        # with a full window whose gradients are not this batch's
        layer = FAMILIES[2].make(1, window=2, warmup=0, dtype=torch.float64)
        for x in torch.randn(4, 4, 3, dtype=torch.float64):
            layer(x).square().sum().backward()
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert not gradcheck(lambda x: copy.deepcopy(layer)(x), x, raise_exception=False)

    def test_nor_is_that_of_renormalization(self):
        layer = FAMILIES[3].make(1, warmup=0, ramp=0, dtype=torch.float64)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert not gradcheck(lambda x: copy.deepcopy(layer)(x), x, raise_exception=False)

    def test_a_window_has_no_second_derivative(self):
        layer, x = FAMILIES[2].make(1), torch.randn(4, 3, requires_grad=True)
        with pytest.raises(InvalidValueError, match="create_graph"):
            torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)

    def test_every_entry_of_the_database_is_run_or_has_its_reason(self):
        descriptions = {i.desc for dims in PLAIN for i in inputs(dims, training=True)}
        known = {*descriptions, "every entry", "negative eps"}
        assert {entry for _, entry, _ in DOES_NOT_APPLY} <= known
        assert nn.BatchNorm1d is ENTRIES[1].module_cls
