"""Optimizers: one module per method, parameter groups, and learning-rate schedules."""
