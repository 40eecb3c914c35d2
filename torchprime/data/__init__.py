"""From raw rows to batches, in plain Python and numpy.

sources -> rows -> tokenize -> pack -> packed -> batch, with order.py saying which blocks make
which step. Nothing here knows a device, a mesh or a framework.
"""
