"""Swapping BatchNorm layers for those of a family, and back, inside an existing model.

A conversion changes the class of the layers where they stand, as torch's lazy modules,
parametrizations and FSDP's ``fully_shard`` do, and puts no new module in their place. So all
references of the rest of the program stay valid, and nothing is copied: the Parameters in an
optimizer, hooks and the handles that remove them, a layer that is used twice, a layer that is
also kept in a list, attributes that were added to it, a model that is just the layer.
torch has no public way to copy some of that (hooks), and its own converter loses it.

First everything is planned and checked, then everything is changed: an error changes nothing.
"""

from bnstats.conversion.run import convert_batchnorm, revert_batchnorm

__all__ = ["convert_batchnorm", "revert_batchnorm"]
