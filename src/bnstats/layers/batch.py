"""What a layer's batch is: some positions of its input, in this process and in others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnstats.errors import InvalidValueError
from bnstats.layers.replicas import Replicas
from bnstats.masked_reduction import masked_mean_and_m2
from bnstats.moments import merge_all
from bnstats.reduction import mean_and_m2


class Batch(NamedTuple):
    """The values that a training forward takes its statistics from.

    Attributes:
        mask: boolean, broadcastable to the input, the channel axis being 1; None for all.
        replicas: the processes whose values count too; None for this one alone.
        where: names the layer in messages.
    """

    mask: Tensor | None = None
    replicas: Replicas | None = None
    where: str = "batch norm"

    def is_whole(self) -> bool:  # (No property: torch 2.6 compiles none of a tuple.)
        """Whether it is all of the input, and no more."""
        return self.mask is None and self.replicas is None

    def moments(self, x: Tensor, *, about_zero: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return number, mean and sum of squared deviations of the values.

        About zero, the mean is 0 and the sum one of squares. With others, it is one exchange.
        """
        x = x.detach()
        if self.replicas is None:
            return self._own_moments(x, about_zero)
        try:
            count, mean, m2 = self._own_moments(x, about_zero)
        except Exception:
            self.replicas.tell_of_failure(x.shape[1], x.device)
            raise
        messages = self.replicas.gather(torch.cat((count.to(mean.dtype).view(1), mean, m2)))
        counts, means, m2s = messages.split([1, len(mean), len(mean)], dim=1)
        return merge_all(counts.squeeze(1).long(), means, m2s)

    def check_count(self, x: Tensor, count: int, least: int) -> None:
        """Refuse a batch of too few values; one of no positions at all is torch's to take."""
        if count >= least or (x.numel() == 0 and self.replicas is None):
            return
        values = "no valid value" if count == 0 else "one"
        together = "" if self.replicas is None else " in all processes together"
        raise InvalidValueError(
            f"{self.where}: expected {least} or more valid values per channel when training, got "
            f"{values}{together}, in an input of shape {tuple(x.shape)}"
        )

    def _own_moments(self, x: Tensor, about_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
        if self.mask is None:
            mean, m2 = mean_and_m2(x)
            count = torch.full((), x.numel() // x.shape[1], device=x.device)
        else:
            count, mean, m2 = masked_mean_and_m2(x, self.mask)
        if about_zero:
            return count, torch.zeros_like(mean), m2.addcmul(mean, mean * count)
        return count, mean, m2


def batch_variance(m2: Tensor, count: Tensor, *, of_none: float = 1.0) -> Tensor:
    """Return the biased variance; of no values 1, which leaves every position as it is."""
    return torch.where(count > 0, m2 / count.clamp(min=1), of_none)
