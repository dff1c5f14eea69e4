"""What is learned: the examples of a record; loss, denominator and metrics of a batch, all as sums.

Seam: Objective (objective.py). A new one is a file here and a yaml in conf/objective/: docs/extending.md.
May import all rooms before it: config, data and model in the main. It knows no engine, no loop and no optimizer.
"""
