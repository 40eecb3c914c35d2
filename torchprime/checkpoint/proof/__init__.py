"""The proof of an export: its certificate, made and checked again."""
