"""Reads a kernel's machine code as nvdisasm prints it: what is in each loop, and what its products multiply.

A line is a label (`.L_x_3:`) or an instruction (`/*0d50*/  @P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;`).
A loop is what lies between a label and a branch back to it.
"""

from __future__ import annotations

import collections
import dataclasses
import re

KINDS = ("HGMMA", "HMMA", "UTCHMMA", "MUFU.EX2", "FFMA", "SHFL", "LDGSTS", "RED")
TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA")

_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_WARPGROUP_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
# Rows and columns are 16 and 8 in every product of a warp; the last digits are the depth.
_WARP_SHAPE = re.compile(r"HMMA\.168(\d+)\.")


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """Instructions of one loop without those of loops inside it, or of all that is in no loop.

    `counts` are instructions by kind; `products` are multiply-adds a warp (HMMA) or a group of four warps (HGMMA)
    issues; the shape of a UTCHMMA is in a register and not in the code, so that it counts 0.
    """

    counts: dict[str, int]
    products: int


@dataclasses.dataclass(frozen=True, slots=True)
class Code:
    """A kernel's instructions: how many, all of them, its loops in order of their first, and what is in no loop."""

    instructions: int
    total: Section
    loops: list[Section]
    outside: Section


def read_code(text: str) -> Code:
    """The sections of a kernel, from `nvdisasm -c`."""
    names: list[str] = []
    labels: dict[str, int] = {}  # index of the first instruction after a label
    spans: dict[int, int] = {}  # of loops, first to last instruction
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.search(line):
            name, operands = instruction.groups()
            target = _TARGET.search(operands)
            # A branch to itself ends a kernel. Branches to one label are one loop, up to the last of them.
            if target and name.startswith("BRA") and (start := labels.get(target[1], len(names))) < len(names):
                spans[start] = len(names)
            names.append(name)
    owner = [-1] * len(names)  # innermost loop of each instruction
    starts = sorted(spans)
    for loop, start in enumerate(starts):  # a loop inside another starts after it
        for index in range(start, spans[start] + 1):
            owner[index] = loop
    parts = [_section([n for n, of in zip(names, owner, strict=True) if of == loop]) for loop in range(-1, len(starts))]
    return Code(instructions=len(names), total=_section(names), loops=parts[1:], outside=parts[0])


def _section(names: list[str]) -> Section:
    counts: dict[str, int] = collections.Counter(_kind(name) for name in names)
    return Section({kind: counts.get(kind, 0) for kind in KINDS}, sum(map(_products, names)))


def _kind(name: str) -> str:
    if name.startswith("MUFU.EX2"):
        return "MUFU.EX2"
    kind = name.split(".")[0]
    return "RED" if kind == "REDG" else kind  # the same instruction's name on newer architectures


def _products(name: str) -> int:
    if shape := _WARPGROUP_SHAPE.match(name):
        rows, columns, depth = map(int, shape.groups())
        return rows * columns * depth
    if shape := _WARP_SHAPE.match(name):
        return 16 * 8 * int(shape[1])
    return 0
