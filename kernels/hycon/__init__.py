"""HyCon's kernels: `lse` is the N x N work alone in every mode, `loss` a whole loss in three launches."""
