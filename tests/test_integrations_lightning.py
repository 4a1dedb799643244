"""Lightning's trainer recalibrates in time: before it validates, before it writes checkpoints."""

import copy
import time
import warnings
from datetime import timedelta

import pytest
import torch
from torch import nn

import bnstats
import trainers
from bnstats.errors import InvalidTypeError, InvalidValueError

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import (  # noqa: E402
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from bnstats.integrations.lightning import RecalibrateBatchNorm  # noqa: E402

# Lightning's own, about torch's internals and about what a tiny training is advised to do.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]
WHOLE = {"max_batches": None, "tolerance": None}


def population(model, data=None, **options):
    """The statistics that a model should have: of all the training data, with its weights."""
    model = copy.deepcopy(model)
    stats = bnstats.measure_population_stats(
        model, trainers.loader(shuffle=False) if data is None else data, **options
    )
    return {
        f"{name}.running_{what}": getattr(layer, what).float()
        for name, layer in stats.items()
        for what in ("mean", "var")
    }


def with_state(state):
    model = trainers.lightning_module()
    model.load_state_dict(state)
    return model


def assert_recalibrated(running, model):
    expected = population(model)
    assert running.keys() == expected.keys()
    for key, value in running.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)


def fit(tmp_path, *callbacks, model=None, data=None, **options):
    model = trainers.lightning_module() if model is None else model
    trainer = trainers.lightning_trainer(tmp_path, [*callbacks], **options)
    data = trainers.loader(shuffle=False) if data is None else data
    trainer.fit(model, data, trainers.loader(10))
    return trainer, model


def test_the_model_ends_with_the_population_statistics_of_its_last_weights(tmp_path):
    callback = RecalibrateBatchNorm(**WHOLE)
    _, model = fit(tmp_path, callback)
    assert_recalibrated(trainers.statistics(model), model)
    assert callback.result.after["net.1"].count == 60
    assert "2 BatchNorm layers recalibrated" in str(callback.result)


def test_without_the_callback_it_does_not(tmp_path):
    _, model = fit(tmp_path)
    with pytest.raises(AssertionError):
        assert_recalibrated(trainers.statistics(model), model)


def test_a_training_goes_on_as_without_the_callback(tmp_path):
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    ends = []
    for generator, callbacks in zip(generators, ([], [RecalibrateBatchNorm()]), strict=True):
        torch.manual_seed(5)
        data = trainers.loader(generator=generator)
        ends.append(trainers.weights(fit(tmp_path, *callbacks, data=data)[1]))
        data = trainers.loader(shuffle=True)
        ends.append(trainers.weights(fit(tmp_path, *callbacks, data=data)[1]))
    for without, with_it in zip(ends[:2], ends[2:], strict=True):
        for key, value in without.items():
            assert torch.equal(value, with_it[key]), key


def test_each_validation_begins_with_the_statistics_of_the_weights_that_it_validates(tmp_path):
    model = trainers.lightning_module(validation=True)
    fit(tmp_path, RecalibrateBatchNorm(**WHOLE), model=model)
    assert len(model.seen) == 2
    for running, weights in model.seen:
        assert_recalibrated(running, with_state({**model.state_dict(), **weights}))


def test_so_does_one_in_the_middle_of_an_epoch_which_goes_on_afterwards(tmp_path):
    model = trainers.lightning_module(validation=True)
    taken = []
    model.on_train_batch_start = lambda batch, _: taken.append(len(batch[0]))
    data = trainers.loader(num_workers=1, persistent_workers=True, shuffle=False)
    fit(
        tmp_path, RecalibrateBatchNorm(**WHOLE),
        model=model, data=data, val_check_interval=0.5, max_epochs=1,
    )  # fmt: skip
    assert sum(taken) == 60
    assert len(model.seen) == 2
    for running, weights in model.seen:
        assert_recalibrated(running, with_state({**model.state_dict(), **weights}))


@pytest.mark.parametrize("late", [False, True])
def test_so_does_one_that_comes_by_time(tmp_path, late):
    """Also where its time comes after the callback's turn, in what the module does last."""
    try:
        lightning.Trainer(
            val_check_interval=timedelta(seconds=1), accelerator="cpu", logger=False,
            enable_checkpointing=False,
        )  # fmt: skip
    except lightning.utilities.exceptions.MisconfigurationException:
        pytest.skip("needs Lightning 2.6, which validates by time")
    model = trainers.lightning_module(validation=True)
    if late:
        model.on_train_batch_end = lambda *_: time.sleep(0.6)
    fit(
        tmp_path, RecalibrateBatchNorm(**WHOLE), model=model, max_epochs=1,
        val_check_interval=timedelta(seconds=0.5 if late else 0),
    )  # fmt: skip
    assert len(model.seen) == 6
    for running, weights in model.seen:
        assert_recalibrated(running, with_state({**model.state_dict(), **weights}))


def test_a_validation_by_itself_changes_nothing(tmp_path):
    trainer, model = fit(tmp_path, RecalibrateBatchNorm(), model=trainers.lightning_module(True))
    model.net[1].running_mean.fill_(7)
    trainer.validate(model, trainers.loader(10), verbose=False)
    torch.testing.assert_close(model.seen[-1][0]["net.1.running_mean"], torch.full((6,), 7.0))


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_are_written_with_them_wherever_the_callback_stands(
    tmp_path, validation, first
):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callbacks = [RecalibrateBatchNorm(**WHOLE), saving]
    model = trainers.lightning_module(validation)
    fit(
        tmp_path, *(callbacks if first else callbacks[::-1]),
        model=model, enable_checkpointing=True,
    )  # fmt: skip
    for epoch in range(2):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        running = {key: value for key, value in saved.items() if "running_" in key}
        assert_recalibrated(running, with_state(saved))


class Averaging(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None or epoch_idx == 1


@pytest.mark.parametrize(
    "average",
    [
        lambda: WeightAveraging(),
        lambda: WeightAveraging(use_buffers=False),
        lambda: EMAWeightAveraging(decay=0.8),
        lambda: Averaging(),
    ],
    ids=["average", "without buffers", "EMA", "after an epoch too"],
)
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_have_their_own_in_validation_checkpoint_and_at_the_end(
    tmp_path, average, first
):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=False)
    callbacks = [RecalibrateBatchNorm(**WHOLE), average()]
    model = trainers.lightning_module(validation=type(callbacks[1]) is not Averaging)
    fit(
        tmp_path, *(callbacks if first else callbacks[::-1]), saving,
        model=model, enable_checkpointing=True,
    )  # fmt: skip
    for running, weights in model.seen:
        assert_recalibrated(running, with_state({**model.state_dict(), **weights}))
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    for state in (saved["state_dict"], saved["current_model_state"], model.state_dict()):
        assert_recalibrated({k: v for k, v in state.items() if "running_" in k}, with_state(state))
    averaged, current = (
        saved[key]["net.0.weight"] for key in ("state_dict", "current_model_state")
    )
    assert not torch.allclose(averaged, current)
    assert torch.equal(averaged, model.net[0].weight)


def test_stochastic_weight_averaging_ends_with_them_and_so_does_its_checkpoint(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    _, model = fit(
        tmp_path, RecalibrateBatchNorm(**WHOLE), swa, saving, max_epochs=3,
        enable_checkpointing=True,
    )  # fmt: skip
    # torch 2.6 saves a function with the schedule of the averaging, not weights alone.
    saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=False)["state_dict"]
    for state in (saved, model.state_dict()):
        assert_recalibrated({k: v for k, v in state.items() if "running_" in k}, with_state(state))


def test_an_average_that_no_callback_keeps_can_be_named(tmp_path):
    model = trainers.lightning_module()
    average = torch.optim.swa_utils.AveragedModel(model.net)
    model.on_train_batch_end = lambda *_: average.update_parameters(model.net)
    data = [x for x, _ in trainers.loader()]
    fit(
        tmp_path, RecalibrateBatchNorm(None, loader=data, averaged_models=[average], **WHOLE),
        model=model,
    )  # fmt: skip
    expected = population(average.module, data)
    assert torch.equal(average.module[1].running_mean, expected["1.running_mean"])


def test_it_runs_every_so_many_epochs_and_at_the_end(tmp_path):
    class Counting(RecalibrateBatchNorm):
        def _recalibrate(self, model, loader, state, *args):
            before = self._state
            super()._recalibrate(model, loader, state, *args)
            if self._state != before:
                done.append(state[0] // 6)

    for every, epochs in ((1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (None, [5])):
        done = []
        fit(tmp_path, Counting(every), max_epochs=5)
        assert done == epochs
    done = []
    fit(tmp_path, Counting(None), max_steps=8, max_epochs=-1)
    assert done == [8 // 6]


def test_early_stopping_ends_with_them(tmp_path):
    model = trainers.lightning_module()
    model.on_train_epoch_end = lambda: model.log("loss", torch.tensor(1.0))
    stopping = EarlyStopping("loss", patience=1)
    trainer, _ = fit(
        tmp_path, RecalibrateBatchNorm(None, **WHOLE), stopping, model=model, max_epochs=9
    )
    assert trainer.current_epoch == 2
    assert_recalibrated(trainers.statistics(model), model)


def test_it_costs_little_by_default_and_reads_no_more_than_the_training_does(tmp_path):
    callback = RecalibrateBatchNorm()
    fit(tmp_path, callback, data=trainers.loader(10_000), max_epochs=1, max_steps=3)
    assert 8 <= callback.result.after["net.1"].num_batches <= 200
    callback = RecalibrateBatchNorm(tolerance=None)
    fit(tmp_path, callback, limit_train_batches=3, max_epochs=1)
    assert callback.result.after["net.1"].num_batches == 3


def test_a_second_training_is_recalibrated_too(tmp_path):
    callback = RecalibrateBatchNorm(None, **WHOLE)
    for _ in range(2):
        _, model = fit(tmp_path, callback)
        assert_recalibrated(trainers.statistics(model), model)


def test_batches_take_the_way_of_the_trainings(tmp_path):
    model = trainers.lightning_module()
    model.on_before_batch_transfer = lambda batch, _: [batch[0] + 10, batch[1]]
    model.on_after_batch_transfer = lambda batch, _: [batch[0] * 2, batch[1]]
    callback = RecalibrateBatchNorm(include=lambda name, _: name == "net.1", **WHOLE)
    fit(tmp_path, callback, model=model, precision="64-true", max_epochs=1)
    x = (trainers.dataset().tensors[0].double() + 10) * 2
    mean = model.net[0](x).mean(0)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(model.net[1].running_mean, mean)


def test_mixed_precision_is_that_of_the_training(tmp_path):
    model = trainers.lightning_module()
    seen = set()
    model.net[1].register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    fit(tmp_path, RecalibrateBatchNorm(), model=model, precision="bf16-mixed", max_epochs=1)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("interval", [1.0, 0.75])
def test_frozen_layers_stay_frozen_in_the_averages_as_well(tmp_path, interval):
    """Also where a validation has put all layers into evaluation mode before."""
    model = trainers.lightning_module(validation=True)
    model.net[1].running_mean.fill_(7)
    model.on_train_epoch_start = lambda: model.net[1].eval()
    callback = RecalibrateBatchNorm()
    at_validation = []
    model.on_validation_epoch_start = lambda: at_validation.append(callback.result)
    fit(
        tmp_path, callback, WeightAveraging(), model=model, val_check_interval=interval,
        num_sanity_val_steps=0,
    )  # fmt: skip
    assert all(result.after.frozen == ("net.1",) for result in at_validation)
    assert callback.result.after.frozen == ("net.1",)
    assert [*callback.result.after] == ["net.5"]
    torch.testing.assert_close(model.net[1].running_mean, torch.full((6,), 7.0))


def test_several_training_loaders_are_asked_about(tmp_path):
    model = trainers.lightning_module()
    steps = []
    model.training_step = lambda batch: (steps.append(1), model(batch["a"][0]).sum())[1]
    loaders = {"a": trainers.loader(), "b": trainers.loader()}
    with pytest.raises(InvalidTypeError, match="a dict of 2 training loaders: pass loader="):
        fit(tmp_path, RecalibrateBatchNorm(), model=model, data=loaders)
    assert not steps
    fit(tmp_path, RecalibrateBatchNorm(loader=loaders["a"]), model=model, data=loaders)


def test_a_module_without_forward_is_asked_for_one_before_the_training(tmp_path):
    class Stepping(type(trainers.lightning_module())):
        forward = lightning.LightningModule.forward

        def training_step(self, batch, _):
            return self.net(batch[0]).sum()

    with pytest.raises(InvalidTypeError, match=r"Stepping has no forward: pass forward=lambda"):
        fit(tmp_path, RecalibrateBatchNorm(), model=Stepping())
    model = Stepping()
    callback = RecalibrateBatchNorm(forward=lambda module, batch: module.net(batch[0]), **WHOLE)
    fit(tmp_path, callback, model=model)
    assert_recalibrated(trainers.statistics(model), with_state(model.state_dict()))


def test_mistakes_are_told_before_the_training():
    with pytest.raises(InvalidTypeError, match="no option 'methd'; the nearest is 'method'"):
        RecalibrateBatchNorm(methd="pooled")
    with pytest.raises(InvalidValueError, match="every_n_epochs: expected 1 or more"):
        RecalibrateBatchNorm(0)
    with pytest.raises(InvalidValueError, match="method: expected one of pooled"):
        RecalibrateBatchNorm(method="layer_wise")


def test_a_model_without_batch_norm_trains_with_a_warning(tmp_path):
    model = trainers.lightning_module()
    model.net = nn.Linear(4, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, RecalibrateBatchNorm(), model=model, max_epochs=1)
    assert any("no BatchNorm layer" in str(w.message) for w in caught)
