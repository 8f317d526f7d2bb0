"""Measuring: how long attention takes, beside the dense kernels a user would otherwise pick."""
