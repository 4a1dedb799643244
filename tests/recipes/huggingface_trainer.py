"""Hugging Face: a callback recalibrates before each evaluation and each checkpoint."""

import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from bnstats.integrations.transformers import RecalibrateBatchNorm

config = ResNetConfig(
    embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
)
data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(16)]
recalibration = RecalibrateBatchNorm()  # every epoch, from the trainer's own data
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        ResNetForImageClassification(config),
        TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=4, use_cpu=True,
            save_strategy="epoch", report_to="none", disable_tqdm=True, logging_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        callbacks=[recalibration],
    )  # fmt: skip
    trainer.train()

print(recalibration.result)
assert len(recalibration.result.after) == 6
