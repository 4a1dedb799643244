"""Lightning: a callback recalibrates before each validation and each checkpoint."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnstats.integrations.lightning import RecalibrateBatchNorm


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


recalibration = RecalibrateBatchNorm()  # every epoch, from the trainer's own data
trainer = Trainer(
    max_epochs=2, callbacks=[recalibration], accelerator="cpu", devices=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Model(), DataLoader(TensorDataset(torch.randn(128, 4)), 16, shuffle=True))

print(recalibration.result)
assert [*recalibration.result.after] == ["net.1"]
