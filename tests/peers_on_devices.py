"""What several processes do with models on devices; test_distributed_devices.py runs it."""

from contextlib import ExitStack, contextmanager, suppress

import torch

import bnstats
import peers
import replicated_layers
from bnstats.errors import PeerError
from cases import FAMILIES
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
        with use_up(peers.device):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def use_up(device):
    """Hold what is left free: the allocator still gives parts of blocks that it has got."""
    held = []
    for size in (2**20 + 512, 512):  # bytes of the smallest block in its pools, large and small
        with suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(size, dtype=torch.uint8, device=device))
    try:
        yield
    finally:
        held.clear()


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


def synchronized_layers_equal_one_process(family, masked, checkpointed=None):
    """On devices the output, gradients and state are those of the whole batch on CPU."""

    def scenario(rank, world):
        for shares in replicated_layers.SHARES[world]:
            twin = replicated_layers.make(family)
            layer = replicated_layers.make(family, sync=True).to(peers.device)
            for x, mask, weight in replicated_layers.batches(sum(shares)):
                mask = mask if masked else None
                layer.zero_grad()
                twin.zero_grad()
                expected = replicated_layers.run(twin, x, mask, weight, None)
                parts = [x, weight] if mask is None else [x, weight, mask]
                mine = [p.to(peers.device) for p in replicated_layers.own(rank, shares, *parts)]
                my_x, my_weight, my_mask = mine if masked else (*mine, None)
                found = replicated_layers.run(layer, my_x, my_mask, my_weight, checkpointed)
                expected = replicated_layers.own(rank, shares, *expected)
                for ours, theirs in zip(found, expected, strict=True):
                    scale = float(theirs.abs().max()) if theirs.numel() else 1
                    assert ours.device == peers.device
                    torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-5 * scale)
            for (name, ours), theirs in zip(layer.named_buffers(), twin.buffers(), strict=True):
                assert ours.device == peers.device
                difference = (ours.cpu() - theirs).abs()
                assert bool((difference <= 1e-5 + 1e-4 * theirs.abs()).all()), name
        return {name: buffer.cpu() for name, buffer in layer.named_buffers()}

    return scenario


def a_synchronized_step_waits_for_nothing_but_its_messages(family):
    """Gloo takes them on CPU, one in the forward and one in the backward; nccl on the device."""

    def scenario(rank, world):
        layer = replicated_layers.make(family, sync=True).to(peers.device)
        x = torch.randn(4, 4, 6).to(peers.device).requires_grad_()
        grad = torch.ones_like(x)
        layer(x).backward(grad)  # makes the communicator
        if peers.device.type == "substitute":
            with substitute.counting() as counts:
                layer(x).backward(grad)
            assert counts.waits == {"copy:d2h": 2}
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).backward(grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return scenario


SCENARIOS = {
    **{name: peers.SCENARIOS[name] for name in peers.ON_DEVICES},
    **{
        f"out_of_memory_is_an_error_on_all[{m}]": out_of_memory_is_an_error_on_all(m)
        for m in peers.METHODS
    },
    "a_model_on_cpu_merges_with_one_on_a_device": a_model_on_cpu_merges_with_one_on_a_device,
    **{
        f"synchronized_layers_equal_one_process[{family.name}, {how}]": (
            synchronized_layers_equal_one_process(family, *options)
        )
        for family in FAMILIES
        for how, options in {
            "plain": (False,),
            "masked": (True,),
            "checkpoint": (False, False),
            "reentrant checkpoint": (False, True),
        }.items()
    },
    **{
        f"a_synchronized_step_waits_for_nothing_but_its_messages[{family.name}]": (
            a_synchronized_step_waits_for_nothing_but_its_messages(family)
        )
        for family in FAMILIES
    },
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
