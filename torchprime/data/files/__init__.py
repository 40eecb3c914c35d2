"""Files, saved folders and the hub become records with ids."""
