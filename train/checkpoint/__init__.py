"""The whole state of a run, saved, found again, checked, and made fit for other ranks.

Seam: Checkpoints (save, advance, settle, load), find.choose(), fingerprint.compare().
May import the rooms before it and engine.py.
"""
