"""What watches over steps that do not fail: bad losses, spikes, slow ranks, weights that change by themselves.

Seam: Guards. They watch and raise; they feed nothing and count nothing of the run's own.
"""
