"""Gated linear units, activation(gate) * up, as one pass forward and one backward.

Seam: glu.glu and glu.glu_packed.
May import: torch, triton, and what the operations share in kernels/. Nothing of tunesmith.train.
"""
