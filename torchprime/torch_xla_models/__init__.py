"""The PyTorch/XLA backend: the only package that imports torch_xla or jax."""
