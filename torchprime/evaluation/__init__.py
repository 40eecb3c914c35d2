"""What a model does on rows it was not trained on."""
