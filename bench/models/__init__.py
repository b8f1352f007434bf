"""What editing costs a model: every variant under the same edit, the same work, side by side in one process.

    make peers                                    # once: a .venv-peers with the peers beside the main environment
    .venv-peers/bin/python -m bench.models        # the default cut, made for some ten minutes on two idle cores
    python -m bench.models --full --minutes 60    # everything that fits; --size --kind --work --variant choose

Ratios are to the unedited model, or in training to the floor (a step that trains an input bias alone), interleaved in
one process; the table has the median over processes and the 95 % interval over them. Results land in models-cpu.csv or
models-cuda.csv, where rows that a run does not measure again stay; the table (.md) and the pictures (.png) are made
from the CSV alone.

To add a row, write a builder in the file of its family under `variants/` (a new file's name goes into MODULES of
registry.py, in the order of the table):

    @variant("gated steering", kinds=("steer",), works=INFERENCE, needs=("some_package",))
    def gated(model, values):       # a model of its own, frozen, sharing its weights with the others
        ...                         # values.forms[layer]: scale, bias, read, offset, write; values.trainable
        return model                # what the works call; or (model, "a note for its rows")

It is timed once its result equals the plain hook's (check.py), and its operations are counted without more ado. A kind
of edit is a row of `_KINDS` in edits.py and of `_WRITTEN` in variants/plain.py, a work a row of works.py, a model a row
of sizes.py; which of them the default cut measures is in cuts.py.
"""

from .study import run

__all__ = ["run"]
