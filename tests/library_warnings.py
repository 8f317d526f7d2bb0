"""Warnings of libraries about themselves, as `pytest.mark.filterwarnings` takes them. No others are ignored."""

SYNC_CHECKS = "ignore:Synchronization debug mode is a prototype:UserWarning"
LEAF_GRADIENTS = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
SCRIPT_METHODS = "ignore:.torch.jit.script_method. is :DeprecationWarning"
# torch.compile's own.
COMPILE = (LEAF_GRADIENTS, SCRIPT_METHODS)
