"""Adapters: small trained matrices on frozen weights, quantized if asked. Plain PyTorch.

A model goes in, the same model with adapted layers comes out; no device and no mesh is named here.
"""
