"""One decoder family in plain PyTorch; no device, mesh or collective is named here."""
