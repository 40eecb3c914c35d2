"""The training loop, the step, the optimizers, and the Protocol that a backend implements."""
