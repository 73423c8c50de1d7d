"""How much of the CPU the HyCon kernels use: GFLOP/s of forward and backward, per type of z.

    python benchmarks/cpu_hycon.py --rows 4096 8192 --dim 128 512 --threads 1 2

Counted are the operations of the products (a multiplication and an addition each), S being symmetric: N² D forward,
3 N² D backward; exponentials come on top. `mm` is torch.mm of z with its transpose, 2 N² D. The rate against the
machine's peak is what to look at: 16 lanes x 2 operations x multiply-adds per cycle x clock for float32 with AVX-512,
twice that for bfloat16 where the processor multiplies it.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from measure import Step, time_interleaved

from allnc import _extension


def steps_of(n: int, d: int) -> dict[str, tuple[float, Step]]:
    """Name -> operations and step."""
    ops = torch.ops.allnc_C
    z = F.normalize(torch.randn(n, d), dim=1)  # [N, D]
    weight, grad, temperature = torch.rand(n), torch.rand(n), torch.tensor(0.1)  # [N], [N], []
    lse = ops.hycon_lse_forward(z, None, weight, None, temperature, True)  # [N]
    steps: dict[str, tuple[float, Step]] = {"mm float32": (2 * n * n * d, lambda: z @ z.T)}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = (z.to(dtype), None, weight, None, temperature, True)
        name = str(dtype).removeprefix("torch.")
        steps[f"forward {name}"] = (n * n * d, lambda x=inputs: ops.hycon_lse_forward(*x))
        steps[f"backward {name}"] = (3 * n * n * d, lambda x=inputs: ops.hycon_lse_backward(grad, lse, *x))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096], help="N")
    parser.add_argument("--dim", type=int, nargs="+", default=[128, 512], help="D")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    if not _extension.has_cpp():
        raise SystemExit(f"the C++ extension is needed: {_extension.extension_error()}")
    print("| threads | N | D | step | ms | p20 | p80 | GFLOP/s |\n|---|---|---|---|---|---|---|---|")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for n in options.rows:
            for d in options.dim:
                steps = steps_of(n, d)
                alone = {name: [step] for name, (_, step) in steps.items()}
                timings = time_interleaved(alone, torch.device("cpu"), seconds=0, min_runs=options.runs)
                for name, time in timings.items():
                    times = (f"{x:.1f}" for x in (time.median, time.p20, time.p80))
                    cells = (threads, n, d, name, *times, f"{steps[name][0] / time.median / 1e6:.0f}")
                    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
