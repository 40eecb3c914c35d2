"""The training step through the TPU's compiler, and what the compiled program needs; no TPU."""
