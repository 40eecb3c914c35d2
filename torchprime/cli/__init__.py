"""Commands around a run; each takes the same config and overrides as the training job."""
