"""Hooks that run around the training steps."""
