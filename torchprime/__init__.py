"""torchprime: supervised fine-tuning for PyTorch on TPU, with proof that GPUs agree."""

__version__ = "0.1.0"
