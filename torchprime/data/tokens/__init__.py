"""Rows become examples: ids, loss weights and the rule behind each label."""
