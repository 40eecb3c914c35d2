"""Commands that combine the weights of several models."""
