"""A run from its config to its model: set-up, feed, loop, best weights, finish.

Seam: run(composed); Run (what never changes), Session (what a roll-back replaces), Loop.step().
May import every room of train/. Nothing imports it but launch/train.py.
"""
