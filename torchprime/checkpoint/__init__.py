"""Reading, checking and writing of model weights: Hugging Face folders and run checkpoints."""
