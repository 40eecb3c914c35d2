"""The one loop, the step, the optimizers, and the Protocol that a backend implements."""
