"""The stack of layers under XLA: one layer forward and backward, and loops over layers."""
