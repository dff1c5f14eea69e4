"""A name -> a module with its adapter and kernels, and what an objective asks of it.

Seam: load_model(config, world), Scorer.
May import config, ranks, files, data and zero, and kernels/. The live model is asked, never named.
"""
