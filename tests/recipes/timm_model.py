"""timm: any of its batch-norm models, and its averages of weights."""

import timm
import torch
from timm.utils import ModelEmaV3

import bnstats

model = timm.create_model("resnet18", num_classes=4)
average = ModelEmaV3(model, decay=0.9)
loader = [(torch.randn(2, 3, 32, 32), torch.zeros(2)) for _ in range(4)]

average.update(model)
bnstats.recompute_population_stats(model, loader)
result = bnstats.recompute_population_stats(average, loader)

assert [*result.after][:2] == ["bn1", "layer1.0.bn1"]
assert len(result.after) == 20
