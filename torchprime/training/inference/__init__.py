"""Uses of a config's model without a training run: held-out loss, graded answers, sampled rows."""
