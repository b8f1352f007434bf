"""What the methods do to really trained models: figures with seeds on docs/effects.md.

    python -m bench.effects --only chat gated    # a chat model from a package; needs no folder
    python -m bench.effects --data FOLDER        # every part; those whose models and texts are not there are skipped by name
    python -m bench.effects --tables             # only the page's tables, from the CSVs

A part appends each row to its CSV in bench/results as the row is done, so it can be stopped and started; delete a row to
measure it again. What is measured was fixed before it was looked at: each part's file says how, at its top.
"""
