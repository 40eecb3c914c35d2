"""The certificate of an export: the checks that make it and that repeat it later."""
