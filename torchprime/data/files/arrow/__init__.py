"""Conversion of Arrow types to JSON values."""
