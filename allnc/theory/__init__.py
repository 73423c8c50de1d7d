"""The theory of neural collapse, computed: unconstrained features, their minimisers, saddles, and class imbalance.

`model` has the objective, `solve` finds and certifies minimisers, `closed_form` says what is known of them, `landscape`
looks at saddles, `imbalance` at classes of different sizes. Nothing is imported here: `python -m allnc.theory --help`
answers before torch is there.
"""
