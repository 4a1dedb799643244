"""Is the drift of every architecture finite after a short training on photographs?

Every classifier of torchvision's with batch normalization, and one of each of timm's families.
Channels die in such trainings, and the variances of others are 0: drift is
measured with eps, as evaluation divides. Those that are done are kept, as with ``pretrained``.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import bnstats
from benchmarks import command
from benchmarks.peers import import_timm, import_torchvision
from benchmarks.photographs import missing, say, synthetic_photos
from benchmarks.rows import Row, Run
from bnstats.cli.photos import Photos

STEPS, BATCH, LEARNING_RATE = 20, 4, 0.01
SMALLER_LEARNING_RATE = 0.001
"""Of VGGs, whose weights turn to NaN at the other: their classifiers are not normalized."""
PIXELS = 64
Make: TypeAlias = Callable[[], nn.Module]

LARGER = {
    "inception_v3": 299,
    **dict.fromkeys(("maxvit_t", "efficientformerv2_s0", "levit_128", "visformer_tiny"), 224),
    **dict.fromkeys(("eca_botnext26ts_256", "bat_resnext26ts"), 256),
    **dict.fromkeys(("coatnet_pico_rw_224", "efficientformer_l1", "volo_d1_224"), 224),
    "vit_small_resnet50d_s16_224": 224,
    **dict.fromkeys(("inception_resnet_v2", "inception_v4"), 96),
}
"""What has an auxiliary head with a size of its own, or windows or positions that are fixed."""

FAMILIES = (
    *("bat_resnext26ts", "coatnet_pico_rw_224", "cpubone_b0_bfrobust", "cs3darknet_focus_m"),
    *("cspnext_s", "densenet121", "dla46_c", "dpn48b", "eca_botnext26ts_256"),
    *("efficientformerv2_s0", "efficientnet_b0", "efficientvim_m1", "efficientvit_b0"),
    *("efficientvit_m0", "ese_vovnet19b_dw", "fasternet_t0", "fastvit_mci0", "fbnetv3_b"),
    *("ghostnet_050", "hardcorenas_a", "hgnetv2_b0", "iformer_m", "inception_next_atto"),
    *("lcnetv2_base", "legacy_seresnet18", "levit_128", "mobilevit_s", "regnetx_002"),
    *("repghostnet_050", "repvit_m0_9", "resnest14d", "resnet10t", "resnetv2_18", "rexnet_100"),
    *("shvit_s1", "skresnet18", "starnet_s1", "swiftformer_s", "visformer_tiny"),
    "xcit_nano_12_p8_224",
    # Where all of a module's have more, the smallest:
    *("convmixer_768_32", "efficientformer_l1", "hrnet_w18_small", "inception_resnet_v2"),
    *("inception_v3", "inception_v4", "legacy_xception", "lowformer_b0", "nasnetalarge"),
    *("nextvit_small", "pnasnet5large", "res2next50", "selecsls42", "tiny_vit_5m_224"),
    *("tresnet_m", "vgg11_bn", "vit_small_resnet50d_s16_224", "volo_d1_224", "xception41p"),
)
"""Of each of timm's modules with batch normalization the first of at most 12 million parameters."""

QUICK = ("mobilenet_v3_small", "shufflenet_v2_x0_5")


def measure(run: Run) -> list[Row]:
    """Train each architecture that is not done; count the channels whose drift is not finite."""
    lacking = missing(run.photos)
    if lacking is not None:
        say(run.quick, lacking)
    path = run.folder / "architectures_done.json"
    done: dict[str, list[int]] = json.loads(path.read_text()) if path.exists() else {}
    load = cache(synthetic_photos if lacking is not None else partial(Photos.load, run.photos))
    end = None if run.minutes is None else time.monotonic() + 60 * run.minutes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models' own code
        models = {} if lacking is not None and not run.quick else architectures(run.quick)
        for name, make in tqdm(models.items(), desc="architectures", disable=run.quick):
            if name in done or (end is not None and time.monotonic() > end):
                continue
            pixels = 32 if run.quick else LARGER.get(name.split()[-1], PIXELS)
            rate = SMALLER_LEARNING_RATE if "vgg" in name else LEARNING_RATE
            done[name] = look(make(), load(pixels), 2 if run.quick else STEPS, rate)
            path.write_text(json.dumps(done, indent=1) + "\n")
    return _rows(done) if done else []


def architectures(quick: bool) -> dict[str, Make]:
    """Return what makes each, by library and name, torchvision's by their parameters."""
    models = import_torchvision().models
    classifiers = [name for name in models.list_models(module=models) if _normalized(name)]
    classifiers.sort(key=lambda name: models.get_model_weights(name).DEFAULT.meta["num_params"])
    if quick:
        classifiers = [name for name in classifiers if name in QUICK]
    found = {f"torchvision {name}": partial(models.get_model, name) for name in classifiers}
    if not quick:
        create = import_timm().create_model
        found = {**{f"timm {name}": partial(create, name) for name in FAMILIES}, **found}
    return found


def _normalized(name: str) -> bool:
    """Whether a classifier of torchvision's has batch normalization."""
    if name.startswith("vgg"):
        return name.endswith("_bn")
    return not name.startswith(("alexnet", "convnext_", "squeezenet", "swin_", "vit_"))


def look(
    model: nn.Module, photos: Photos, steps: int, learning_rate: float = LEARNING_RATE
) -> list[int]:
    """Train; return the numbers of layers, of dead channels, and of channels without a drift."""
    torch.manual_seed(0)
    images, labels = photos.train.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    model.train()
    for chosen in torch.randperm(len(images)).repeat(2)[: steps * BATCH].split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(logits(model(images[chosen])), labels[chosen]).backward()
        optimizer.step()
    stats = bnstats.measure_population_stats(model, images[: 16 * BATCH].split(BATCH))
    drifts = stats.drift_from(model).values()
    dead = sum(int(layer.dead.sum()) for layer in stats.values())
    return [len(stats), dead, sum(int(bad.sum()) for drift in drifts for bad in _not_finite(drift))]


def logits(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the main head's, of those that have auxiliary ones."""
    return output if isinstance(output, Tensor) else output[0]


def _not_finite(drift: bnstats.Drift) -> Iterator[Tensor]:
    yield ~torch.stack([values.isfinite() for values in drift]).all(0)


def _rows(done: dict[str, list[int]]) -> list[Row]:
    """Return two rows for each architecture, and the promise for all."""
    work, what = f"drift after {STEPS} steps on photographs", "channels whose drift is not finite"
    rows = []
    for name, (layers, dead, bad) in done.items():
        size = f"{name}, {layers} layers"
        rows += [
            Row(work, size, what, bad, unit="channels"),
            Row(work, size, "dead channels", dead, unit="channels"),
        ]
    total = sum(bad for _, _, bad in done.values())
    return [
        *rows,
        Row(work, f"{len(done)} architectures", what, total, unit="channels", at_most=0),
    ]


if __name__ == "__main__":
    command.main("architectures")
