"""What each of several processes does; test_integrations_peers.py asks them."""

import importlib.util
import warnings

import torch
import torch.distributed as dist

import conftest  # noqa: F401 (torchvision, which torchmetrics imports)
import trainers


def lightning(folder):
    from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

    from bnstats.integrations.lightning import RecalibrateBatchNorm

    callback = RecalibrateBatchNorm(max_batches=None, tolerance=None)
    saving = ModelCheckpoint(folder, filename="lightning", save_weights_only=False)
    trainer = trainers.lightning_trainer(
        folder, [callback, WeightAveraging(), saving],
        strategy="ddp", devices=2, enable_checkpointing=True,
    )  # fmt: skip
    model = trainers.lightning_module()
    trainer.fit(model, trainers.loader())
    return model, callback


def transformers(folder):
    from bnstats.integrations.transformers import RecalibrateBatchNorm

    callback = RecalibrateBatchNorm(max_batches=None, tolerance=None)
    trainer = trainers.transformers_trainer(
        folder, [callback], ddp_backend="gloo", save_strategy="epoch", eval_strategy="epoch"
    )
    trainer.train()
    return trainer.model, callback


def run(rank, folder):
    """Train with every trainer that is there, and keep what this process ends with."""
    warnings.simplefilter("ignore")
    for train in (lightning, transformers):
        if importlib.util.find_spec(train.__name__) is None:
            continue
        model, callback = train(folder)
        said = {"state": model.state_dict(), "count": callback.result.after["net.1"].count}
        torch.save(said, folder / f"{train.__name__}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
