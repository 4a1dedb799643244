"""What a callback cannot do is told when it is made, not after an epoch of training."""

import pytest
import torch
from torch import nn

import bnstats
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.integrations.recalibrator import DEFAULTS, Recalibrator

SOURCE = bnstats.measure_population_stats(nn.BatchNorm1d(3), torch.randn(12, 3).split(4))

WRONG = [
    ({"method": "layer_wise"}, InvalidValueError, "method: expected one of pooled, .*'layer_wise'"),
    ({"max_batches": -1}, InvalidValueError, "max_batches: expected 1 or more, got -1"),
    ({"include": ["net.1"]}, InvalidTypeError, r"include: expected a function .*got list; for"),
    ({"tolerance": "x"}, InvalidTypeError, "tolerance: expected a number or None, got str"),
    ({"tolerance": 0}, InvalidValueError, "tolerance: expected a positive number"),
    ({"on_nonfinite": "ignore"}, InvalidValueError, """"raise" or "skip", got 'ignore'"""),
    ({"forward": lambda b: b}, InvalidTypeError, r"forward: expected a function .*<lambda>\(b\)"),
    ({"prior": 3}, InvalidTypeError, "prior: expected PopulationStats .*got int"),
    (
        {"prior": SOURCE, "method": "ema"},
        InvalidValueError,
        'prior: .* expected method="layerwise"',
    ),
    ({"prior": SOURCE, "tolerance": 0.1}, InvalidValueError, "expected None with a prior"),
    ({"memory_limit": 5}, InvalidValueError, 'memory_limit: only method="layerwise"'),
]
NUMBERS = [
    ("5", InvalidTypeError, "every_n_epochs: expected an int or None, got str"),
    (1.5, InvalidTypeError, "every_n_epochs: expected an int or None, got float"),
    (True, InvalidTypeError, "every_n_epochs: expected an int or None, got bool"),
    (0, InvalidValueError, "every_n_epochs: expected 1 or more, got 0"),
]


@pytest.mark.parametrize(("options", "error", "says"), WRONG)
def test_a_value_that_is_wrong_is_told_when_the_callback_is_made(options, error, says):
    with pytest.raises(error, match=says):
        Recalibrator(**options)


@pytest.mark.parametrize(("number", "error", "says"), NUMBERS)
def test_how_often_is_a_whole_number_of_epochs_or_none(number, error, says):
    with pytest.raises(error, match=says):
        Recalibrator(number)


@pytest.mark.parametrize("number", [None, 1, 3])
def test_numbers_that_count_epochs_are_taken(number):
    assert Recalibrator(number).every_n_epochs == number


def test_a_prior_is_taken_without_the_default_tolerance():
    few, model = torch.randn(2, 3) + 1, nn.Sequential(nn.BatchNorm1d(3))
    source = bnstats.measure_population_stats(model, torch.randn(12, 3).split(4))
    callback = Recalibrator(prior=source)
    callback._recalibrate(model, [few], state=1)
    expected = bnstats.measure_population_stats(
        model, [few], prior=source, max_batches=DEFAULTS["max_batches"]
    )
    assert callback.result.after.method == "layerwise"
    torch.testing.assert_close(model[0].running_mean, expected["0"].mean.float())
