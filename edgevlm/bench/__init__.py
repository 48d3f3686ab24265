"""`edgevlm bench`: the stages of an answer timed against the machine's limits and against a peer.

run.py measures through the engine's one data path, machine.py says what the machine could do,
mtmd.py is the peer, report.py and plot.py show the result.
"""
