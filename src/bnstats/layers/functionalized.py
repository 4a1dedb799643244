"""A layer whose buffers torch.func.functionalize does not follow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class _ForwardAlone(nn.Module):
    """A layer's forward, whose hooks have run."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = self.layer.forward(input, mask)
        return output


def forward_below(
    functionalize: Any, layer: nn.Module, input: Tensor, mask: Tensor | None
) -> Tensor:
    """Run a layer's forward as one operator of the function that is functionalized.

    Writes to what is no argument of that function are none of its concern: torch's batch norm,
    which is one operator, moves its running statistics there.
    """
    parameters = {f"layer.{name}": value for name, value in layer.named_parameters()}
    parameters, arguments = functionalize.unwrap_tensors((parameters, (input, mask)))
    with functionalize.redispatch_to_next():
        output = functional_call(_ForwardAlone(layer), parameters, arguments)
    wrapped: Tensor = functionalize.wrap_tensors(output)
    return wrapped
