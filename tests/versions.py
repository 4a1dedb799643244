"""What the oldest torch that is supported cannot do, visibly."""

import pytest
import torch

OLDEST = torch.__version__.startswith("2.6.")


SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Without, torch shards on accelerators only, and has no batch norm of DTensors."""


def fails_on_oldest(reason):
    """Expect a failure there, for a reason that is torch's."""
    return pytest.mark.xfail(OLDEST, reason=f"torch 2.6: {reason}")
