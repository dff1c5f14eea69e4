"""The processes of a run: who they are, what they tell each other, where each is, and how it is asked to end.

Seam: World and the collectives (distributed.py), reach(Phase) (progress.py), stop_request (stop.py).
May import config.
"""
