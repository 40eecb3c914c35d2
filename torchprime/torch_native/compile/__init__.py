"""Compilation of the one-program step by the TPU compiler, without a TPU."""
