"""What every target of benchmarks/fuzz.py needs: damage to bytes, and a look at the error that is to name it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

Target = Callable[[Random, Path], None]


def refused(error: Exception, *names: str) -> None:
    """Check that an error is what a user can read: a ValueError of one printable line that has one of the names."""
    text = str(error)
    if type(error) is not ValueError or not text.isprintable() or not any(name in text for name in names):
        raise AssertionError(f"not a readable error: {type(error).__name__}: {text!r}") from error


def mutated(random: Random, raw: bytes) -> bytes:
    """Damage bytes in one to four places: bits, extreme numbers, cuts, repeats, noise."""
    data = bytearray(raw)
    for _ in range(random.randint(1, 4)):
        size = len(data)
        at = random.randrange(min(size, 64) + 1) if random.random() < 0.4 else random.randrange(size + 1)
        length = random.choice((1, 2, 4, 8, random.randrange(1, 200)))
        kind = random.randrange(7)
        if kind == 0 and at < size:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            number = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
            data[at : at + 4] = struct.pack(random.choice("<>") + "I", number)[: len(data[at : at + 4])]
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at : at + length] = random.randbytes(length)
        elif kind == 5:
            data[at : at + length] = bytes([random.choice((0, 255))]) * length
        elif random.random() < 0.3:
            del data[at:]
    return bytes(data)
