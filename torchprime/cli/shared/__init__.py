"""Modules for several commands: arguments, output columns, prepared data."""
