"""Triton kernels and the host code that launches them. Knows tensors; knows no optimizer or model.

Import it as ``ars.csrc_triton``. Only the fused paths of :mod:`ars` do, when they are first used,
so that everything else works without Triton.
"""

import functools
import importlib.util

__all__ = ["has_triton"]

if __name__ != "ars.csrc_triton":
    raise ImportError(
        f"csrc_triton was imported as {__name__!r}; import it as ars.csrc_triton: two names would "
        "be two modules, each with its own kernels"
    )


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is imported only when a kernel is launched."""
    return importlib.util.find_spec("triton") is not None
