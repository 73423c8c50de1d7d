"""Marks of tests that need a backend."""

from __future__ import annotations

import pytest

from allnc.ops._common import has_triton, triton_interprets

# Kernels on a GPU are tested in tests/gpu and tests/kernels.
needs_interpreter = pytest.mark.skipif(
    not (has_triton() and triton_interprets()),
    reason="Triton takes CPU tensors only where it interprets (TRITON_INTERPRET=1, set where there is no GPU)",
)
