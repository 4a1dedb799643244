"""What a recalibration refuses, and what it says."""

import copy

import pytest
import torch
from torch import nn

import bnstats
from bnstats.errors import (
    InvalidTypeError,
    InvalidValueError,
    TooFewValuesError,
)
from networks import assert_untouched, snapshot


def test_too_few_values_for_a_variance_are_an_error_that_names_the_layer():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(1, 3)
    before = snapshot(model)
    with pytest.raises(TooFewValuesError, match="layer '0' saw 1 value"):
        bnstats.recompute_population_stats(model, [x])
    for method in ("batch_average", "ema"):
        with pytest.raises(TooFewValuesError, match=r"layer .0. saw 1 value .* each of its"):
            bnstats.recompute_population_stats(model, [x, x], method=method)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": print}, InvalidTypeError, "expected a torch.nn.Module, got builtin_function"),
        ({"loader": 5}, InvalidTypeError, "expected an iterable of batches.*got int"),
        ({"loader": torch.randn(4, 3)}, InvalidTypeError, r"got Tensor.*\[batch\]"),
        ({"loader": {"x": torch.randn(4, 3)}}, InvalidTypeError, "got dict"),
        ({"loader": []}, InvalidValueError, "expected at least one batch, got none"),
        ({"loader": iter(())}, InvalidValueError, "an iterator can be read only once"),
        ({"loader": [[]]}, InvalidValueError, "empty sequence"),
        ({"loader": [object()]}, InvalidTypeError, "got object; pass forward="),
        ({"method": "mean"}, InvalidValueError, "expected one of pooled.*got 'mean'"),
        ({"max_batches": 0}, InvalidValueError, "max_batches: expected 1 or more, got 0"),
        ({"max_batches": 2.0}, InvalidTypeError, "max_batches: expected an int"),
        ({"correction": 2}, InvalidValueError, "correction: expected 1"),
        ({"on_nonfinite": "ignore"}, InvalidValueError, '"raise" or "skip", got \'ignore\''),
        (
            {"include": "bn1"},
            InvalidTypeError,
            "include: expected a function include.name, module. or None, got str",
        ),
        (
            {"forward": 3},
            InvalidTypeError,
            "forward: expected a function forward.model, batch. or None, got int",
        ),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d())},
            InvalidTypeError,
            r"layer '1' \(LazyBatchNorm1d\) is lazy",
        ),
    ],
)
def test_misuse_says_what_was_expected_and_what_came(arguments, error, says):
    arguments = {"model": nn.BatchNorm1d(3), "loader": [torch.randn(4, 3)], **arguments}
    for function in (bnstats.recompute_population_stats, bnstats.measure_population_stats):
        with pytest.raises(error, match=says):
            function(
                arguments["model"],
                arguments["loader"],
                **{k: v for k, v in arguments.items() if k not in ("model", "loader")},
            )


class PseudoLabels:
    """Batches of what the model is sure of, chosen while they are read."""

    def __init__(self, model):
        self.model = model

    def __iter__(self):
        for x in torch.randn(4, 16, 3):
            yield x[self.model(x).amax(1) > 0]


@pytest.mark.parametrize("method", ["pooled", "batch_average", "ema", "layerwise", "sweeps"])
def test_a_loader_that_runs_the_measured_model_is_refused_and_a_copy_is_not(method):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    before = snapshot(model)
    with pytest.raises(InvalidValueError, match=r"layer '1': the loader runs the model .*deepcopy"):
        bnstats.recompute_population_stats(model, PseudoLabels(model), method=method)
    assert_untouched(model, before)
    loader = PseudoLabels(copy.deepcopy(model))
    bnstats.recompute_population_stats(model, loader, method=method)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("method", ["pooled", "batch_average", "ema", "layerwise", "sweeps"])
def test_a_lazy_layer_of_any_class_is_refused_and_stays_lazy(method):
    # It would be measured behind random weights, which a failure would leave in the model.
    model = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3))
    with pytest.raises(InvalidTypeError, match=r"layer '0' \(LazyLinear\) is lazy.*one forward"):
        bnstats.recompute_population_stats(model, [torch.randn(4, 2)], method=method)
    assert model[0].has_uninitialized_params()
    model(torch.randn(4, 2))
    bnstats.recompute_population_stats(model, [torch.randn(4, 2)], method=method)
