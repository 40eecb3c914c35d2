"""Readers of the logs that trainers write, which return one form."""
