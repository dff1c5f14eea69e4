"""Some steps recorded: where their time and memory go, and which of our settings would change it.

Seam: Profiler, which the loop tells of every step; a hand-made trace goes through read_trace() and analyse().
May import config, ranks, files and track.
"""
