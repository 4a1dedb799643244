"""Other frameworks, a module for each: it imports the framework, and nothing else imports it.

- :class:`bnstats.integrations.lightning.RecalibrateBatchNorm`: for Lightning's Trainer.
- :class:`bnstats.integrations.transformers.RecalibrateBatchNorm`: for Hugging Face's Trainer.
- :mod:`bnstats.integrations.timm`: timm's layers that normalize and activate.
"""
