"""Training: options, loop (`allnc.trainer.loop.train`), checkpoints, measurements, run folder."""
