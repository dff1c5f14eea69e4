"""DeepSpeed's inside: its config, its files, where ZeRO keeps a parameter, and a checkpoint cut for other ranks.

Seam: what engine.py and model/ need of it: deepspeed_config(), full_shape(), gathered(), local_part(), load().
May import config, ranks and files. A new DeepSpeed is a change here, and in engine.py at most.
"""
