"""Compilation of the training step by the TPU compiler, without a TPU."""
