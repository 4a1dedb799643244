"""On a CUDA device: no host synchronization, capture into a graph, and what is to be reached."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import bnstats
from benchmarks import command
from benchmarks.machine import device
from benchmarks.rows import Row, Run, rows
from benchmarks.timing import compare
from benchmarks.workloads import (
    TRAINING_PASSES,
    Work,
    batches,
    compare_layers,
    forward,
    forward_backward,
    torchvision_model,
    training_step,
)

FAMILIES = ["ema", "cumulative", "moving_average", "renorm"]
SIZE = (16, 3, 64, 64)
LARGE = (256, 64, 56, 56)
TRAINING = "bare forward, training mode"
EVALUATION = "bare forward, evaluation mode"
TORCH = "nn.BatchNorm2d"
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    TORCH: nn.BatchNorm2d,
    "EMABatchNorm2d": bnstats.EMABatchNorm2d,
    "CumulativeBatchNorm2d": bnstats.CumulativeBatchNorm2d,
    "MovingAverageBatchNorm2d": partial(bnstats.MovingAverageBatchNorm2d, warmup=0),
    "RenormBatchNorm2d": partial(bnstats.RenormBatchNorm2d, warmup=0, ramp=1),
}


SIZES = [(32, 64, 56, 56), (32, 256, 28, 28), (32, 2048, 7, 7)]
AT_MOST_LAYER = 1.05  # of cudnn's
AT_MOST_STEP = 1.02
AT_MOST_POOLED = 1.00  # of the forward in training mode
AT_MOST_LAYERWISE = 1.15  # of the forward in evaluation mode


def measure(run: Run) -> list[Row]:
    """Measure a training step with each family, and each layer where memory is the limit."""
    if device().type != "cuda":
        print("left out: there is no CUDA device;", end=" ")
        return []
    measured = []
    for family in FAMILIES:
        model = bnstats.convert_batchnorm(torchvision_model("resnet18"), family)
        measured += [_synchronizations(copy.deepcopy(model), family), *_graph(model, family, run)]
    return measured + goals(run)


def goals(run: Run) -> list[Row]:
    """Measure what has a goal on a GPU. Nothing of it needs one to run."""
    return [*_layers(run), *_half_steps(run), *_recalibrations(run)]


def _layers(run: Run) -> list[Row]:
    """Measure each layer alone, at the sizes of a ResNet and where memory is the limit."""
    measured = []
    for size in [(4, 8, 6, 6)] if run.quick else [*SIZES, LARGE]:
        measured += compare_layers(
            "forward and backward",
            size,
            {name: forward_backward(layer(size[1]), size) for name, layer in LAYERS.items()},
            TORCH,
            passes=TRAINING_PASSES,
            at_most={name: AT_MOST_LAYER for name in LAYERS if name != TORCH and size != LARGE},
            rounds=3 if run.quick else 60,
            calls=1 if run.quick else 10,
        )
    return measured


def _half_steps(run: Run) -> list[Row]:
    """Compare training steps as networks on GPUs take them: bfloat16, channels_last."""
    name, size = ("resnet18", (2, 3, 32, 32)) if run.quick else ("resnet50", (64, 3, 224, 224))
    models = {TORCH: torchvision_model(name)}
    for family in FAMILIES:
        models[family] = bnstats.convert_batchnorm(torchvision_model(name), family)
    steps = {what: _half_step(model, size) for what, model in models.items()}
    return rows(
        f"{name} training step, bfloat16, channels_last",
        str(size),
        compare(steps, rounds=1 if run.quick else 40),
        TORCH,
        at_most=dict.fromkeys(FAMILIES, AT_MOST_STEP),
    )


def _half_step(model: nn.Module, size: tuple[int, ...]) -> Work:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(size, device=device()).to(memory_format=torch.channels_last)
    y = torch.randint(10, (size[0],), device=device())

    def step() -> None:
        with torch.autocast(device().type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _recalibrations(run: Run) -> list[Row]:
    """Compare recalibrations with bare forwards of the same batches."""
    name, shape = (
        ("resnet18", (2, 2, 3, 32, 32)) if run.quick else ("resnet50", (8, 64, 3, 224, 224))
    )
    model, data = torchvision_model(name), batches(*shape)
    methods = {
        what: partial(bnstats.measure_population_stats, model, data, method=what)
        for what in ("pooled", "layerwise")
    }
    bare = {
        what: forward(model, data, training=what == TRAINING) for what in (TRAINING, EVALUATION)
    }
    timings = compare({**bare, **methods}, rounds=1 if run.quick else 9)
    work = f"measurement, {len(data)} batches of {shape[1:]}"
    promises = (("pooled", TRAINING, AT_MOST_POOLED), ("layerwise", EVALUATION, AT_MOST_LAYERWISE))
    return [
        row
        for method, against, at_most in promises
        for row in rows(
            work,
            name,
            {what: timings[what] for what in (against, method)},
            against,
            at_most={method: at_most},
        )
    ]


def _synchronizations(model: nn.Module, family: str) -> Row:
    """Take one training step in which the host may wait for nothing."""
    step, found = training_step(model, SIZE), 0
    step()  # what is made once, such as handles and momentum buffers, may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        found = 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    work = "host synchronization in a ResNet-18 training step"
    return Row(work, str(SIZE), family, found, unit="found", at_most=0)


def _graph(model: nn.Module, family: str, run: Run) -> list[Row]:
    """Compare a captured training step with the eager one: what it leaves, and its time."""
    torch.manual_seed(0)
    eager_model = copy.deepcopy(model)
    eager_step = training_step(eager_model, SIZE)
    torch.manual_seed(0)  # the same batch
    replay, warmups = _captured(model, training_step(model, SIZE))
    for _ in range(3):
        replay()
    for _ in range(warmups + 3):
        eager_step()
    work, what = "ResNet-18 training step", f"{family}, replayed graph"
    difference = max(map(_difference, _statistics(model), _statistics(eager_model)))
    eager = f"{family}, eager"
    functions = {eager: eager_step, what: replay}
    return [
        Row(work, str(SIZE), f"{what}, statistics", difference, unit="relative difference"),
        *rows(work, str(SIZE), compare(functions, rounds=1 if run.quick else 60), eager),
    ]


def _captured(model: nn.Module, step: Work, warmups: int = 3) -> tuple[Work, int]:
    """Return the replay of a captured step, and how many steps were taken before.

    As torch's notes on CUDA graphs say: warm up on a side stream, and let the capture allocate
    the gradients. Capturing runs nothing.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmups):
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, warmups


def _statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("running_var")]


def _difference(left: Tensor, right: Tensor) -> float:
    return float(((left - right).abs() / right.abs().clamp(min=1e-12)).max())


if __name__ == "__main__":
    command.main("cuda")
