"""Readers that turn files, saved data sets and hub datasets into records with ids."""
