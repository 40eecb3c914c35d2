"""Graders: a generated answer and its reference become a number."""
