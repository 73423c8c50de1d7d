"""Methods x data sets x seeds, one training process a run: `python -m allnc.sweep SWEEP.yaml --out DIR`.

Legend: method, a few options; data set, a recipe and a few options; run, one method on one data set with one seed.
"""
