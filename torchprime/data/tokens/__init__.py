"""Examples from rows: ids, loss weights and the rule behind each label."""
