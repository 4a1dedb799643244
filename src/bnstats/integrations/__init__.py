"""Callbacks for trainers; each module imports its framework, and nothing else does.

- :class:`bnstats.integrations.lightning.RecalibrateBatchNorm`: for Lightning's Trainer.
- :class:`bnstats.integrations.transformers.RecalibrateBatchNorm`: for Hugging Face's Trainer.
"""
