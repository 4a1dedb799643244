"""What each of several processes does; test_integrations_peers.py starts it by torchrun."""

import importlib.util
import sys
import warnings
from pathlib import Path

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


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for run in (lightning, transformers):
        if importlib.util.find_spec(run.__name__) is None:
            continue
        model, callback = run(folder)
        said = {"state": model.state_dict(), "count": callback.result.after["net.1"].count}
        torch.save(said, folder / f"{run.__name__}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
