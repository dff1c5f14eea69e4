"""RMSNorm as one pass forward and one backward.

Seam: rms_norm.rms_norm.
May import: torch, triton, and what the operations share in kernels/. Nothing of tunesmith.train.
"""
