"""Training: the loop, its checkpoints, measurements and run folder."""

from allnc.trainer.loop import DivergenceError, Run, train

__all__ = ["DivergenceError", "Run", "train"]
