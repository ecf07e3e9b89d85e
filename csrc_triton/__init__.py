"""Triton kernels and the host code that launches them. Knows tensors; knows no optimizer or model.

Import it as ``ars.csrc_triton``. Only the fused paths of :mod:`ars` do, when they are first used,
so that everything else works without Triton.
"""

if __name__ != "ars.csrc_triton":
    raise ImportError(
        f"csrc_triton was imported as {__name__!r}; import it as ars.csrc_triton: two names would "
        "be two modules, each with its own kernels"
    )
