"""Commands that have a model answer the rows of a config: evaluate, sample."""
