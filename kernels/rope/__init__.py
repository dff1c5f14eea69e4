"""Rotary position embedding of queries and keys as one pass, forward and backward.

Seam: rope.rope.
May import: torch, triton, and what the operations share in kernels/. Nothing of tunesmith.train.
"""
