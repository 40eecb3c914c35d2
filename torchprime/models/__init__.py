"""One decoder family in plain PyTorch, without any device, mesh or collective."""
