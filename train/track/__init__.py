"""Numbers -> console, files, W&B and the report. The only room that knows W&B.

Seam: Reporter, which speaks on rank 0 and is silent elsewhere; Throughput.
May import config, ranks, files and data.
"""
