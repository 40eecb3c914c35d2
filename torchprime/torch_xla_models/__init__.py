"""The PyTorch/XLA backend: the only place that imports torch_xla or jax."""
