"""The loss: output head and cross-entropy in one operation, without ever holding the logits.

Seam: linear_cross_entropy.linear_cross_entropy and its TokenStats.
May import: torch, triton, and what the operations share in kernels/. Nothing of tunesmith.train.
"""
