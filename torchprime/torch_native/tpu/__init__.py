"""The whole training step as one program per chip, for TorchTPU."""
