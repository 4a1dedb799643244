"""What tensors hold, as tests of memory count it."""

import gc

import torch


def count_new_values():
    """Return a function that counts the values of the tensors that were made since.

    Those of before are kept: other tests' garbage goes at any time, and counts for nothing.
    """
    gc.collect()
    before = {id(tensor): tensor for tensor in _tensors()}

    def count():
        gc.collect()
        return sum(tensor.numel() for tensor in _tensors() if id(tensor) not in before)

    return count


def _tensors():
    return [found for found in gc.get_objects() if type(found) is torch.Tensor]
