"""Data preparation, from raw rows to batches, in plain Python and numpy.

sources -> rows -> tokens -> packed blocks -> batches; blocks/order.py decides which blocks make
each step. No module here depends on a device, a mesh or a training framework.
"""
