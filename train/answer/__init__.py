"""The trained model at work: evaluated, asked, exported, merged.

Seam: evaluate(), answers(), Bot, export.write(), export.verify().
May import the rooms before it and engine.py, but not checkpoint.
"""
