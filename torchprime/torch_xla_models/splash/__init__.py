"""Attention on a TPU: the kernels of `attention_kernels`, called on a mesh by torch_xla."""
