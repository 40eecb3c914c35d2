"""Attention on a TPU: jax's splash kernel forward, and a backward kernel of our own."""
