"""The networks that are trained on photographs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.peers import import_torchvision
from bnstats.cli.photos import efficientnet_lite0

PRETRAINED, FROM_SCRATCH = "EfficientNet-Lite0", "ResNet-18 of half width"
SYNTHETIC = "a small network"


@dataclass(frozen=True)
class Network:
    """A network, and how it is trained."""

    make: Callable[[int], nn.Module]
    size: int
    gradient_batch: int
    learning_rate: float


def half_resnet18(num_classes: int) -> nn.Sequential:
    """Return a ResNet-18 with half as many channels, its weights drawn anew."""
    block = import_torchvision().models.resnet.BasicBlock
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 32
    for outputs, stride in ((32, 1), (64, 2), (128, 2), (256, 2)):
        shortcut = None
        if stride > 1:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        layers += [block(inputs, outputs, stride, shortcut), block(outputs, outputs)]
        inputs = outputs
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, num_classes)
    )


def _small_network(num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8, momentum=0.01), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


def self_padding_efficientnet(num_classes: int) -> nn.Module:
    """Return EfficientNet-Lite0; where convolutions can pad by themselves, no layer copies first.

    It pads as TensorFlow does; with a stride of 1 that is the same on all sides.
    """
    model = efficientnet_lite0(num_classes)
    for module in model.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            module.padding = padding.padding[:2]
            module.static_padding = nn.Identity()
    return model


NETWORKS = {
    PRETRAINED: Network(self_padding_efficientnet, 96, 16, 0.02),
    FROM_SCRATCH: Network(half_resnet18, 64, 32, 0.05),
    SYNTHETIC: Network(_small_network, 16, 16, 0.02),
}
