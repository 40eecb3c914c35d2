"""The commands that prepare a run and need no backend."""
