"""What is on disk, made so that a crash at any moment leaves it whole: the run folder, rows, manifests, who may write.

Seam: durable.py (every change to the disk is one operation), fence (fence.py), run_folder.py, RankFiles.
May import config and ranks.
"""
