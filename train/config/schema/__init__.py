"""The dataclass of each config group, in a file of the group's name, with the checks that need no other group.

Seam: config.py, which puts them together and is where the rest of the code imports them from.
"""
