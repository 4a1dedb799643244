"""Torch's layers with weights of mean zero: what lets a batch norm do without the batch's mean.

In every forward the mean of the weight over everything but the output axis is taken out
(weight centralization). Inputs that share one mean then give outputs of mean 0, up to the bias:
:class:`~bnstats.MovingAverageBatchNorm` has no mean of its own, and wants such a layer before
it. Arguments, parameters, state-dict keys and initialization are torch's; the parameter itself
is left as it is. A weight of one number per output is its own mean: nothing is left of it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def centered(weight: Tensor) -> Tensor:
    """Return a weight, of shape (out, ...), minus its mean over all axes but the first.

    Example:
        >>> import torch
        >>> from bnstats.layers.centered import centered
        >>> centered(torch.tensor([[1.0, 3.0], [4.0, 4.0]])).tolist()
        [[-1.0, 1.0], [0.0, 0.0]]
    """
    mean = weight.mean(dim=tuple(range(1, weight.dim())), keepdim=True)
    return weight - mean


class CenteredLinear(nn.Linear):
    """``nn.Linear`` with centered weights: ``x (w - mean(w))^T + bias``, one mean per output.

    Args:
        in_features: size of the input's last axis.
        out_features: size of the output's.
        bias: learn a bias per output.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> import torch
        >>> from bnstats import CenteredLinear
        >>> layer = CenteredLinear(4, 3, bias=False)
        >>> bool(layer(torch.full((2, 4), 7.0)).abs().max() < 1e-5)
        True

    References:
        Yan et al. (2020), arXiv:2001.06838, section 4.3.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the centered weight."""
        output: Tensor = F.linear(input, centered(self.weight), self.bias)
        return output


class CenteredConv1d(nn.Conv1d):
    """``nn.Conv1d`` with centered weights; see :class:`CenteredConv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the centered weight."""
        output: Tensor = self._conv_forward(input, centered(self.weight), self.bias)
        return output


class CenteredConv2d(nn.Conv2d):
    """``nn.Conv2d`` with centered weights: one mean per output channel, over all else.

    Arguments are those of ``nn.Conv2d``, groups and padding modes included. Zeros of the
    padding have a mean of their own: only away from the edges does a constant input give 0.

    Example:
        >>> import torch
        >>> from bnstats import CenteredConv2d
        >>> layer = CenteredConv2d(4, 3, kernel_size=3, bias=False)
        >>> bool(layer(torch.full((2, 4, 5, 5), 7.0)).abs().max() < 1e-5)
        True

    References:
        Yan et al. (2020), arXiv:2001.06838, section 4.3.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the centered weight."""
        output: Tensor = self._conv_forward(input, centered(self.weight), self.bias)
        return output


class CenteredConv3d(nn.Conv3d):
    """``nn.Conv3d`` with centered weights; see :class:`CenteredConv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the centered weight."""
        output: Tensor = self._conv_forward(input, centered(self.weight), self.bias)
        return output
