"""The attention kernels of a TPU in Pallas, for every backend."""
