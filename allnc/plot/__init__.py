"""Pictures of trained runs: `python -m allnc.plot RUN...` and, of a small example, `python -m allnc.plot.simplex`."""
