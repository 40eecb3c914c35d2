"""Records become rows: a prompt and its completion, or a conversation."""
