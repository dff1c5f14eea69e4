"""The LoRA matmul: a linear layer with an adapter beside its weight, alone, in a group that shares its input, or DoRA.

Seam: lora_linear.lora_linear, lora_linear_group and dora_linear.
May import: torch, triton, and what the operations share in kernels/. Nothing of tunesmith.train.
"""
