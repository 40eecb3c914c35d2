"""A compiled XLA program (HLO text): parsed, counted, and timed by a chip's published speeds."""
