"""Hugging Face's trainer recalibrates in time: before it evaluates, before it writes."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import bnstats
import trainers
from bnstats.errors import InvalidTypeError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from safetensors.torch import load_file  # noqa: E402

from bnstats.integrations.transformers import RecalibrateBatchNorm  # noqa: E402

WHOLE = {"max_batches": None, "tolerance": None}


def fit(folder, *callbacks, **options):
    trainer = trainers.transformers_trainer(folder, [*callbacks], **options)
    trainer.train()
    return trainer


def assert_recalibrated(running, model):
    """The first layer's input does not depend on how shuffled batches are normalized."""
    expected = bnstats.measure_population_stats(
        copy.deepcopy(model), DataLoader(trainers.Rows(), 10)
    )["net.1"]
    for what in ("mean", "var"):
        torch.testing.assert_close(
            running[f"net.1.running_{what}"], getattr(expected, what).float(), rtol=1e-5, atol=1e-5
        )


def saved(folder):
    model = trainers.Scored()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def test_the_model_ends_with_the_population_statistics_of_its_last_weights(tmp_path):
    callback = RecalibrateBatchNorm(**WHOLE)
    model = fit(tmp_path, callback).model
    assert_recalibrated(trainers.statistics(model), model)
    assert callback.result.after["net.1"].count == 60
    model = fit(tmp_path).model
    with pytest.raises(AssertionError):
        assert_recalibrated(trainers.statistics(model), model)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 1},
        {"save_strategy": "steps", "save_steps": 4},
        {"gradient_accumulation_steps": 4},
    ],
    ids=["epochs", "steps", "saving", "accumulating"],
)
def test_a_training_goes_on_as_without_the_callback(tmp_path, workers, options):
    if workers:
        options = {
            **options, "dataloader_num_workers": workers, "dataloader_persistent_workers": True,
        }  # fmt: skip
    without = trainers.weights(fit(tmp_path, **options).model)
    with_it = trainers.weights(fit(tmp_path, RecalibrateBatchNorm(**WHOLE), **options).model)
    for key, value in without.items():
        assert torch.equal(value, with_it[key]), key


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_checkpoints_and_evaluations_have_them(tmp_path, strategy):
    options = {f"{kind}_strategy": strategy for kind in ("eval", "save")}
    options |= {f"{kind}_steps": 4 for kind in ("eval", "save")}
    trainer = fit(tmp_path, RecalibrateBatchNorm(**WHOLE), **options)
    steps = {"epoch": (6, 12), "steps": (4, 8, 12)}[strategy]
    seen = [running for running, _ in trainer.model.seen]
    for step in steps:
        model = saved(tmp_path / f"checkpoint-{step}")
        assert_recalibrated(trainers.statistics(model), model)
        assert any(
            all(torch.equal(running[k], v) for k, v in trainers.statistics(model).items())
            for running in seen
        )


def test_the_best_model_that_is_loaded_at_the_end_has_them(tmp_path):
    trainer = fit(
        tmp_path, RecalibrateBatchNorm(**WHOLE), eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, num_train_epochs=3,
    )  # fmt: skip
    assert_recalibrated(trainers.statistics(trainer.model), trainer.model)


def test_it_runs_every_so_many_epochs_and_at_the_end(tmp_path):
    class Counting(RecalibrateBatchNorm):
        def _recalibrate(self, model, loader, state, *args):
            if self._state != (state,):
                done.append(state / 6)
            super()._recalibrate(model, loader, state, *args)

    for every, epochs in ((1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (None, [5])):
        done = []
        fit(tmp_path, Counting(every), num_train_epochs=5)
        assert done == epochs
    done = []
    fit(tmp_path, Counting(None), max_steps=8)
    assert done == [8 / 6]


def test_averages_are_recalibrated_too(tmp_path):
    model = trainers.Scored()
    average = torch.optim.swa_utils.AveragedModel(model)

    class Averaging(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            average.update_parameters(model)

    fit(
        tmp_path, Averaging(), RecalibrateBatchNorm(averaged_models=[average], **WHOLE), model=model
    )
    assert not torch.equal(average.module.net[0].weight, model.net[0].weight)
    for each in (model, average.module):
        assert_recalibrated(trainers.statistics(each), each)


def test_mixed_precision_is_that_of_the_training(tmp_path):
    model = trainers.Scored()
    seen = set()
    model.net[1].register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    fit(tmp_path, RecalibrateBatchNorm(), model=model, bf16=True)
    assert seen == {torch.bfloat16}


def test_a_real_model_of_transformers_is_served(tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=2, layer_type="basic"
    )
    model = transformers.ResNetForImageClassification(config)
    images = torch.randn(12, 3, 16, 16)
    rows = [{"pixel_values": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(images)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    callback = RecalibrateBatchNorm(**WHOLE)
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(callback.result.after) == len(norms) > 4
    first = model.resnet.embedder.embedder
    mean = first.convolution(images).mean((0, 2, 3))
    torch.testing.assert_close(first.normalization.running_mean, mean, rtol=1e-4, atol=1e-5)


def test_mistakes_are_told_before_the_training():
    with pytest.raises(InvalidTypeError, match="no option 'tolerence'; the nearest is 'tol"):
        RecalibrateBatchNorm(tolerence=0.1)
    with pytest.raises(InvalidTypeError, match="tolerance: expected a number or None, got str"):
        RecalibrateBatchNorm(tolerance="0.1")
