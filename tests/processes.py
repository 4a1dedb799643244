"""Several processes at once, as torchrun starts them, and cheaper."""

import os
import socket

from torch import multiprocessing

# What they have in common, imported once: they are forks of a process that did nothing else.
IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor", "bnstats", "pytest"]


def together(function, size, *args):
    """Call ``function(rank, *args)`` in so many processes, each with torchrun's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    multiprocessing.start_processes(
        _start, (size, port, function, args), nprocs=size, start_method="forkserver"
    )


def _start(rank, size, port, function, args):
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    function(rank, *args)
