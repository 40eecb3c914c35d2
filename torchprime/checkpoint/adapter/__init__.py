"""Adapters as files: PEFT folders, their certificates, and the merge into the base's weights."""
