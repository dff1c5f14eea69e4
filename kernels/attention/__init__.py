"""Attention inside segments: tokens of one record see those before them in the same record, and no others.

segments.py            where the segments of a batch begin, on the host and on its device; groups of like lengths
segment_attention.py   the public function, its formula and reference, and which of the ways below is taken
flash.py               by flash attention: torch's variable-length kernels on CUDA, groups of segments on a CPU
installed.py           what the packages of FlashAttention 2 and 3 add where they are installed
flex.py                by flex_attention, on a GPU: soft caps and float32
eager.py               by whole scores of each group of segments: what is left
"""
