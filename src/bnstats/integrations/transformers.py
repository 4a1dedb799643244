"""A callback for Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "bnstats.integrations.transformers needs transformers: pip install 'transformers[torch]'"
    ) from error

from bnstats.integrations.recalibrator import Recalibrator


class RecalibrateBatchNorm(Recalibrator, TrainerCallback):
    """Recalibrates batch norm from the trainer's own training data, in every process.

    At the end of an epoch, before its evaluation and before its checkpoint is written, and where
    ``eval_strategy`` or ``save_strategy`` is ``"steps"`` before each of those. The model is called
    as in training, mixed precision included; batches are those of ``trainer``'s training loader.
    Random numbers are drawn as if nothing had been read, so that the training goes on as without.

    Args:
        every_n_epochs: how often. None: at the planned end of training alone.
        loader: what to read; by default the trainer's own.
        averaged_models: averages of the weights that you keep; pass this callback behind the one
            that updates them.
        options: those of :func:`bnstats.recompute_population_stats`. By default
            ``max_batches=200, tolerance=0.01``: as few batches as give each layer's statistics
            to a hundredth, and at most 200; with a prior, which takes no tolerance, 200.

    Attributes:
        result: the last :class:`bnstats.Recalibration` of the model; None before the first.

    Raises:
        InvalidValueError: an option's value that recompute_population_stats does not take.
        InvalidTypeError: an unknown option, or a value of another type.

    Example:
        >>> from bnstats.integrations.transformers import RecalibrateBatchNorm
        >>> recalibration = RecalibrateBatchNorm(every_n_epochs=2, tolerance=0.005)
        >>> # Trainer(model, arguments, train_dataset=data, callbacks=[recalibration])
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what cannot be run, now rather than after an epoch."""
        self._begin(kwargs["model"], kwargs["train_dataloader"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Recalibrate before an evaluation or a checkpoint between epochs, and at the end."""
        used = control.should_evaluate or control.should_save
        if control.should_training_stop or (used and self.every_n_epochs is not None):
            self._run(state, **kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Recalibrate before an evaluation or a checkpoint, unless that was done."""
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if self._is_due(round(state.epoch), ends=ends):
            self._run(state, **kwargs)

    def _run(self, state: Any, *, model: nn.Module, train_dataloader: Any, **_: Any) -> None:
        # Accelerate's keeps count of where the training is; what it wraps does not.
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        self._recalibrate(model, self._batches(loader), state.global_step)
