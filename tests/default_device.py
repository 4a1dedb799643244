"""A default device for a while."""

from contextlib import contextmanager

import torch


@contextmanager
def set_for_all(device):
    before = torch.empty(0).device
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None if before == torch.device("cpu") else before)
        if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", before) is None:
            del torch._GLOBAL_DEVICE_CONTEXT.device_context  # None makes torch 2.6 raise
