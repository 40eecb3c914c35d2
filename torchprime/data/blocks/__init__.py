"""Batches from examples: storage, mixtures, packing into blocks, and the order of blocks."""
