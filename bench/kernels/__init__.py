"""The kernel study: every op, forward and backward, beside the copy bandwidth of the machine and its peers.

    python -m bench.kernels [--out bench/results] [--full] [--op edit_add] [--minutes 6]

cases.py says what is measured, study.py measures it, table.py and plot.py render the CSV without measuring again.
"""
