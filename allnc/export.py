"""Write a trained run for other programs: `python -m allnc.export RUN_DIR --format onnx`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from allnc._command import Parser, answer
from allnc.inference.options import add_weights, check_run

ENDINGS = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, compare with the run, and say how close; return 0, or 2 for a mistake of the user."""
    parser = Parser("allnc.export", __doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a run, or one with its last.safetensors")
    parser.add_argument(
        "--format",
        choices=tuple(ENDINGS),
        required=True,
        help="safetensors: weights, and a .json that says what they mean; torch: a program for torch.export.load; "
        "onnx: for onnxruntime and others",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default RUN_DIR/model with the format's ending")
    parser.add_argument("--overwrite", action="store_true", help="let files that are there be replaced")
    parser.add_argument(
        "--raw", action="store_true", help="take uint8 images and normalise them inside (torch and onnx)"
    )
    add_weights(parser)
    parser.add_argument("--data.root", dest="root", help="images of a run of an older version on a file of arrays")
    options = parser.parse_args(arguments)
    return answer("allnc.export", lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    ending = ENDINGS[options.format]
    out: Path = options.out or options.run / f"model{ending}"
    if out.suffix != ending:
        raise ValueError(f"--out must end in {ending} with --format {options.format}; got {out}")
    if options.raw and options.format == "safetensors":
        raise ValueError("--raw needs --format torch or onnx; weights alone normalise nothing")
    files = [out, out.with_suffix(".json")] if options.format == "safetensors" else [out]
    there = [path for path in files if path.exists()]
    if there and not options.overwrite:
        raise ValueError(f"--out must be new; {there[0]} is there: give --overwrite to replace it, or another --out")
    if folder := next((path for path in there if path.is_dir()), None):
        raise ValueError(f"--out must be a file; {folder} is a folder")
    if options.out and not out.parent.is_dir():
        raise ValueError(f"--out must be in a folder that is there; got {out}")
    check_run(options.run)
    from allnc.inference.export import export  # torch from here on
    from allnc.inference.predictor import load

    predictor = load(options.run, which=options.which, device="cpu", root=options.root, pretrained=options.pretrained)
    done = export(predictor, options.format, out, raw=options.raw)
    shape = ", ".join(map(str, predictor.card.shape))
    takes = "features" if len(predictor.card.shape) == 1 else "uint8 images" if options.raw else "normalised images"
    size = sum(path.stat().st_size for path in done.files) / 1e6
    print(
        f"{' and '.join(map(str, done.files))}: {size:.1f} MB, {takes} [N, {shape}] -> logits "
        f"[N, {len(predictor.classes)}]; "
        f"largest difference from the run {done.difference:.1e} ({done.relative:.1e} of the largest logit)"
    )


if __name__ == "__main__":
    sys.exit(main())
