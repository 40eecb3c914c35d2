"""torchprime: supervised fine-tuning for PyTorch on TPU, with proof that GPUs agree."""

__version__ = "0.2.0"
