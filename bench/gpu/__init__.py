"""First contact with a GPU: a list of steps, the most informative first (steps.py); `python -m bench.gpu --help`."""
