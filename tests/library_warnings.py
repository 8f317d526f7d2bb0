"""Warnings of libraries about themselves, as `pytest.mark.filterwarnings` takes them. No others are ignored."""

SYNC_CHECKS = "ignore:Synchronization debug mode is a prototype:UserWarning"
LEAF_GRADIENTS = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
SCRIPT_METHODS = "ignore:.torch.jit.script_method. is :DeprecationWarning"
# Of products in fp32 on a GPU, such as those that emulate float8.
TENSOR_FLOAT_32 = "ignore:TensorFloat32 tensor cores for float32 matrix multiplication available:UserWarning"
# torch.compile's own.
COMPILE = (LEAF_GRADIENTS, SCRIPT_METHODS, TENSOR_FLOAT_32)
