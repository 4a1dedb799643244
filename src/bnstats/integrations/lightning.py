"""A callback for Lightning's Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable
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

from bnstats.integrations.recalibrator import Batches, Recalibrator
from bnstats.traversal import is_average


class RecalibrateBatchNorm(Recalibrator, Callback):
    """Recalibrates batch norm from the trainer's own training data, in every process.

    At the end of an epoch, before its validation and before its checkpoint is written, and before
    a validation in the middle of one (``val_check_interval``). Averages of weights that other
    callbacks keep (WeightAveraging, EMAWeightAveraging) are recalibrated too, each with its own
    weights; StochasticWeightAveraging's is, in the epoch that it adds for batch norm. Batches take
    the way of the training's: the datamodule's hooks, the strategy's device, the precision. Random
    numbers are drawn as if nothing had been read, so that the training goes on as without.

    A checkpoint in the middle of an epoch (``every_n_train_steps``) has the running averages of
    then.

    Args:
        every_n_epochs: how often. None: at the end of training alone, which does not know an end
            by early stopping before its last checkpoint is written.
        loader: what to read; by default ``trainer.train_dataloader``.
        averaged_models: averages of weights that no callback keeps.
        options: those of :func:`bnstats.recompute_population_stats`. By default
            ``max_batches=200, tolerance=0.01``: as few batches as give each layer's statistics
            to a hundredth, and at most 200.

    Attributes:
        result: the last :class:`bnstats.Recalibration` of the model; None before the first.

    Raises:
        InvalidValueError: an unknown option.
        InvalidTypeError: at the start of a training with several loaders, of which none was
            passed, or of a module without ``forward``, where none was passed either.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from bnstats.integrations.lightning import RecalibrateBatchNorm
        >>> recalibration = RecalibrateBatchNorm(method="layerwise", max_batches=50)
        >>> trainer = Trainer(callbacks=[recalibration], logger=False, accelerator="cpu")
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place behind whoever averages weights, and before whoever writes them."""
        last = trainer.checkpoint_callbacks
        others = [x for x in trainer.callbacks if x is not self and x not in last]
        trainer.callbacks = [*others, self, *last]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot be read or run, now rather than after an epoch."""
        self._begin(pl_module, without=LightningModule.forward)
        self._batches(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Recalibrate before a validation, which comes next."""
        whole = trainer.check_val_every_n_epoch is not None
        batches = (batch_idx if whole else trainer.fit_loop.total_batch_idx) + 1
        every = trainer.val_check_batch if trainer.enable_validation else None
        if trainer.is_last_batch or (every is not None and batches % every == 0):
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate before a checkpoint, unless that was done with these weights."""
        epochs = trainer.current_epoch + 1
        planned = epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if self._is_due(epochs, ends=planned or trainer.should_stop):
            self._run(trainer, pl_module, epochs)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate after an end that was not planned, unless that was done."""
        self._run(trainer, pl_module, trainer.current_epoch)

    def _run(self, trainer: Any, pl_module: Any, epochs: int) -> None:
        loader = self._batches(trainer, pl_module)
        kept = (value for callback in trainer.callbacks for value in vars(callback).values())
        state, averages = (trainer.global_step, epochs), filter(is_average, kept)
        with trainer.precision_plugin.forward_context():
            self._recalibrate(trainer.model, loader, state=state, averages=averages)

    def _batches(self, trainer: Any, pl_module: Any) -> Iterable[Any]:
        """Return what the training reads, each batch on the way that the training sends it."""

        def prepare(batch: Any) -> Any:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        limit = trainer.num_training_batches if self._loader is None else math.inf
        return Batches(self._one_loader(trainer.train_dataloader), prepare, limit)
