"""Whether ranks and nodes are alive and fit: who died, hangs or is out of memory, said in one line.

Seam: Watchdog, check_nodes(), explained().
May import config, ranks, files and track.
"""
