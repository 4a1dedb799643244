"""What the layers refuse, and what they say."""

import numpy as np
import pytest
import torch

from bnstats.errors import InvalidTypeError, InvalidValueError
from cases import assert_state, each_family, state


@each_family
@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"num_features": 0}, InvalidValueError, "num_features: expected 1 or more, got 0"),
        ({"num_features": 2.5}, InvalidTypeError, "num_features: expected an int, got float"),
        ({"num_features": "3"}, InvalidTypeError, "num_features: expected an int, got str"),
        ({"momentum": 1.5}, InvalidValueError, r"momentum: expected a number in \[0, 1\].*1.5"),
        ({"momentum": -0.1}, InvalidValueError, "momentum"),
        ({"momentum": float("nan")}, InvalidValueError, "momentum"),
        ({"momentum": "0.1"}, InvalidTypeError, "momentum: expected a number, got str"),
        ({"eps": 0}, InvalidValueError, "eps: expected a positive number, got 0"),
        ({"eps": -1e-5}, InvalidValueError, "eps"),
        ({"eps": None}, InvalidTypeError, "eps: expected a number, got NoneType"),
    ],
)
def test_wrong_arguments_are_named(family, arguments, error, says):
    with pytest.raises(error, match=f"{family.base.__name__}.*{says}"):
        family.base(**{"num_features": 3, **arguments})


@each_family
def test_numpys_numbers_are_numbers(family):
    layer = family.base(np.int64(3), eps=np.float32(1e-3), momentum=np.float64(0.5))
    assert layer(torch.randn(4, 3)).shape == (4, 3)


@each_family
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dims", "size"),
    [(1, (4, 3, 5, 5)), (2, (4, 3)), (2, (4, 2, 5, 5)), (3, (4, 3, 5, 5)), (1, (3,))],
)
def test_an_input_of_the_wrong_shape_is_named_and_changes_nothing(family, training, dims, size):
    layer = family.make(dims).train(training)
    before = state(layer)
    with pytest.raises(
        InvalidValueError, match=rf"expected a .*{dims + 2}d.*got shape \({size[0]}"
    ):
        layer(torch.randn(size))
    assert_state(layer, before)


@each_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_an_input_of_the_wrong_dtype_is_refused_and_changes_nothing(family, dtype):
    layer = family.make(1)
    before = state(layer)
    with pytest.raises((RuntimeError, TypeError), match=r"dtype|implemented for|got torch"):
        layer(torch.ones(4, 3, dtype=dtype))
    assert_state(layer, before)
