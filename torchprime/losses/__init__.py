"""Losses of a batch as sums over tokens. Plain PyTorch; no device and no mesh is named here."""
