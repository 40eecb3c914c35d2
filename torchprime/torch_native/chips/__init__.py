"""The backend that trains with one program per chip, by TorchTPU."""
