"""Triton kernels and the functions that launch them, without autograd or state: the package allnc.kernels."""

if __name__ != "allnc.kernels":
    raise ImportError(
        f"the kernels are the package allnc.kernels; got an import as {__name__!r}, which would load a "
        "second copy of them. Use `import allnc.kernels`, and run Python where allnc can be imported"
    )
