"""The specification: eager PyTorch, any device and dtype."""
