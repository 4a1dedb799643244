"""What several processes do with models on devices; test_distributed_devices.py runs it."""

from contextlib import ExitStack, contextmanager

import torch

import bnstats
import peers
from bnstats.errors import PeerError
from substitute import substitute


@contextmanager
def nothing_left():
    """Have no memory on the device of this process."""
    if peers.device.type == "substitute":
        with substitute.without_memory():
            yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def out_of_memory_is_an_error_on_all(method):
    """From the middle of a forward on, one process can allocate nothing any more."""

    def scenario(rank, world):
        model, parts = peers.network(), peers.shards(world + 1)
        before = {key: value.cpu() for key, value in model.state_dict().items()}
        with ExitStack() as until_the_end:
            if rank == 1:
                model[3].register_forward_pre_hook(
                    lambda *_: until_the_end.enter_context(nothing_left())
                )
            peers.raises(
                torch.OutOfMemoryError if rank == 1 else PeerError,
                lambda: bnstats.recompute_population_stats(model, parts[rank], method=method),
                "" if rank == 1 else "rank 1",
            )
        for key, value in model.state_dict().items():
            assert torch.equal(value.cpu(), before[key])

    return scenario


def a_model_on_cpu_merges_with_one_on_a_device(rank, world):
    model, parts = peers.network(), peers.shards(world)
    if rank == 0:
        model.cpu()
    stats = bnstats.measure_population_stats(model, parts[rank])
    return [vars(s) for s in stats.values()]


SCENARIOS = {
    **{name: peers.SCENARIOS[name] for name in peers.ON_DEVICES},
    **{
        f"out_of_memory_is_an_error_on_all[{m}]": out_of_memory_is_an_error_on_all(m)
        for m in peers.METHODS
    },
    "a_model_on_cpu_merges_with_one_on_a_device": a_model_on_cpu_merges_with_one_on_a_device,
}


def run(rank, world, folder, kind, backend):
    """Run every scenario with this process's models on its own device."""
    if kind == "substitute":
        substitute.register()
    else:
        torch.backends.cudnn.allow_tf32 = False  # too coarse to be compared
        torch.cuda.set_device(rank)
    peers.device = torch.device(kind, rank)
    peers.run(rank, world, folder, backend, SCENARIOS)
