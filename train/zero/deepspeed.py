"""DeepSpeed, imported with our options. Importing it makes it choose its accelerator (DS_ACCELERATOR)."""

import logging
import warnings

import deepspeed

__all__ = ["deepspeed"]

# DeepSpeed compiles a shared-memory all-reduce for CPU inference at every first start (about 50 s, and a stale build
# lock hangs later starts for ever). Training reduces through gloo and never calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# 2026-11: DeepSpeed 0.19.8 calls collectives that torch 2.13 has renamed; nothing a user can mend.
warnings.filterwarnings(
    "ignore", message=".*is deprecated. Please use", category=FutureWarning, module="torch.distributed"
)
