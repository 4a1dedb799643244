"""A callback for Lightning's Trainer."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError:  # the same under the name that it is published under as well
    try:
        from pytorch_lightning import (  # type: ignore[assignment, no-redef, unused-ignore]
            Callback,
            LightningModule,
        )
    except ImportError as error:
        raise ImportError(
            "bnstats.integrations.lightning needs Lightning: pip install lightning"
        ) from error

from bnstats.integrations.recalibrator import Recalibrator


class RecalibrateBatchNorm(Recalibrator, Callback):
    """Recalibrates batch norm from the trainer's own training data, in every process.

    At the end of an epoch, before its validation and before its checkpoint is written, and before
    a validation in the middle of one (``val_check_interval``, of batches or of time). Averages of
    weights that other callbacks keep (WeightAveraging, EMAWeightAveraging) are recalibrated too,
    each with its own weights; StochasticWeightAveraging's is, in the epoch that it adds for batch
    norm. Batches take the way of the training's: the datamodule's hooks, the strategy's device, the
    precision. Random numbers are drawn as if nothing had been read, so that the training goes on as
    without.

    A checkpoint in the middle of an epoch (``every_n_train_steps``) has the running averages of
    then.

    Args:
        every_n_epochs: how often. None: at the end of training alone, which does not know an end
            by early stopping before its last checkpoint is written.
        loader: what to read; by default ``trainer.train_dataloader``.
        averaged_models: averages of weights that no callback keeps.
        options: those of :func:`bnstats.recompute_population_stats`. By default
            ``max_batches=200, tolerance=0.01``: as few batches as give each layer's statistics
            to a hundredth, and at most 200; with a prior, which takes no tolerance, 200.

    Attributes:
        result: the last :class:`bnstats.Recalibration` of the model; None before the first.

    Raises:
        InvalidValueError: an option's value that recompute_population_stats does not take.
        InvalidTypeError: an unknown option, or a value of another type; at the start of a training
            with several loaders, of which none was passed, or of a module without ``forward``,
            where none was passed either.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from bnstats.integrations.lightning import RecalibrateBatchNorm
        >>> recalibration = RecalibrateBatchNorm(method="layerwise", max_batches=50)
        >>> trainer = Trainer(callbacks=[recalibration], logger=False, accelerator="cpu")
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place behind whoever averages weights, and before whoever writes them."""
        trainer.callbacks = self._before(trainer.checkpoint_callbacks, trainer.callbacks)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot be read or run, now rather than after an epoch."""
        self._begin(pl_module, trainer.train_dataloader, without=LightningModule.forward)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Recalibrate after an epoch's last batch: a checkpoint may be written right after it."""
        self._remember_modes(pl_module)
        if trainer.is_last_batch:
            self.on_train_epoch_end(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate before each validation during a training: by batches, by time, at its end."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            with self._modes_of_training(pl_module):
                self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate before a checkpoint, unless that was done with these weights."""
        epochs, steps = trainer.current_epoch + 1, trainer.global_step
        ends = trainer.should_stop or epochs == trainer.max_epochs or steps == trainer.max_steps
        if self._is_due(epochs, ends=ends):
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate, unless that was done with these weights; an end may come unplanned."""
        plugin, to_device = trainer.precision_plugin, trainer.strategy.batch_to_device
        steps = (plugin.convert_input, pl_module._on_before_batch_transfer, to_device)
        loader = self._batches(trainer.train_dataloader, steps, trainer.num_training_batches)
        state = (trainer.global_step, trainer.fit_loop.epoch_progress.current.ready)
        self._recalibrate(trainer.model, loader, state, trainer.callbacks, plugin.forward_context)
