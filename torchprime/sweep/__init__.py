"""Sweeps: several runs of one config that differ in some values, and the table of what came out."""
