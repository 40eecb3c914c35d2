"""The training step through the TPU's own compiler, without a TPU."""
