"""Printing and escaping text of foreign origin."""
