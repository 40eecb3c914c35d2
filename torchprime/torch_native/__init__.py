"""The backend on torch.distributed: CUDA with NCCL, CPU with gloo."""
