"""A small training for each trainer's callback; test_integrations.py and its peers run it."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def dataset(size=60):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 4, generator=generator) * torch.tensor([1.0, 2, 3, 4]) + 5
    return TensorDataset(x, (x.sum(1) > 20).long())


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 5),
        nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip


def loader(size=60, **options):
    return DataLoader(dataset(size), 10, **{"shuffle": True, **options})


def lightning_module(validation=False):
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.seen = []  # the running statistics that each validation began with

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    if validation:

        def validation_step(self, batch, _):
            if not self.trainer.sanity_checking:
                self.seen.append((statistics(self), weights(self)))

        Classifier.validation_step = validation_step
    return Classifier()


def lightning_trainer(folder, callbacks, **options):
    from lightning.pytorch import Trainer

    return Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 2, "logger": False, "devices": 1,
            "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "default_root_dir": folder,
            **options,
        },
        callbacks=callbacks,
    )  # fmt: skip


class Scored(nn.Module):
    """As Hugging Face's models are: keyword arguments in, a loss out."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.seen = []

    def forward(self, x, labels=None):
        if not self.training and not torch.is_grad_enabled():
            self.seen.append((statistics(self), x))
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __init__(self, size=60):
        self.x, self.labels = dataset(size).tensors

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.labels[index]}


def transformers_trainer(folder, callbacks, model=None, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        **{
            "output_dir": str(folder), "num_train_epochs": 2, "per_device_train_batch_size": 10,
            "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "logging_strategy": "no", "dataloader_pin_memory": False, **options,
        }
    )  # fmt: skip
    return Trainer(
        Scored() if model is None else model, arguments, train_dataset=Rows(),
        eval_dataset=Rows(10), callbacks=callbacks,
    )  # fmt: skip


def statistics(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "running_" in key}


def weights(model):
    return {key: value.detach().clone() for key, value in model.named_parameters()}
