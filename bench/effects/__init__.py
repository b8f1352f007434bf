"""What the methods do to really trained models: figures with seeds on docs/methods.md.

    python -m bench.effects                      # every part; rows that are in the CSVs are not measured again
    python -m bench.effects --only steering      # or recontrol, sst2, rahf
    python -m bench.effects --tables             # only the page's tables, from the CSVs

Needs the folder `shared` beside the repository. A part appends each row to its CSV in bench/results as the row is
done, so it can be stopped and started; delete a row to measure it again. What is measured was fixed before it was looked
at: each part's file says how, at its top.
"""
