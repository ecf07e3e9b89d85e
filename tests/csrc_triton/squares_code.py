"""Compile the kernel of the per-sample squares and print what the machine code says.

Run as a script, without TRITON_INTERPRET: ``python squares_code.py`` prints a JSON object,
``"dtype/architecture/ragged or dense" -> report``.
"""

import json
import re
import sys
from typing import Any

from kernel_code import disassembled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from ars.csrc_triton import fisher

ARCHITECTURES: tuple[Any, ...] = (80, 90, 100, "gfx942")
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What the multiprocessors of each architecture multiply matrices with.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def build(dtype: str, arch: Any, *, ragged: bool) -> Any:
    """Compile for operands whose sizes and strides 16 divides."""
    hip = isinstance(arch, str)
    kernel: Any = fisher.squared_products_kernel
    capability = None if hip else divmod(arch, 10)
    constants = {
        "RAGGED": ragged, "ADD": True, "UPCAST": False, "BLOCK_P": fisher.BLOCK_P,
        "BLOCK_D": fisher.BLOCK_D, "BLOCK_T": fisher.block_t(DTYPES[dtype], capability),
        "GROUP": fisher.GROUP,
    }  # fmt: skip
    pointers = {"out": "*fp32", "g": f"*{dtype}", "a": f"*{dtype}", "offsets": "*i64"}
    aligned = {*pointers, "p", "d", "g_sample", "g_row", "a_sample", "a_row"}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name in aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    warp = 64 if hip else 32
    options = fisher.OPTIONS | {"num_warps": fisher.THREADS // warp}
    if hip:
        options["num_stages"] = 2
    source = ASTSource(kernel, signature, values, attributes)
    target = GPUTarget("hip" if hip else "cuda", arch, warp)
    return compile_kernel(source, target=target, options=options)


def report_cuda(kernel: Any, arch: int) -> dict[str, Any]:
    sass, usage = disassembled(kernel)
    return usage | {
        "shared": kernel.metadata.shared,
        "tensor_core": len(re.findall(rf"\b{TENSOR_CORE[arch]}\b", sass)),
        "atomics": len(re.findall(r"\b(?:ATOMG?|REDG?)\b", sass)),
        # Copies of operands to shared memory behind the products' backs, by their bytes.
        "copies": sorted(set(re.findall(r"\bLDGSTS\.E[.\w]*?\.(128|64|32)\b", sass))),
    }


def report_hip(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]
    return {
        "local": sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", code))),
        "shared": kernel.metadata.shared,
        "tensor_core": len(re.findall(r"\bv_mfma", code)),
        "atomics": len(re.findall(r"\bglobal_atomic", code)),
    }


def main() -> None:
    reports = {}
    for dtype in DTYPES:
        for arch in ARCHITECTURES:
            for ragged in (False, True) if dtype == "bf16" else (False,):
                kernel = build(dtype, arch, ragged=ragged)
                key = f"{dtype}/{arch}/{'ragged' if ragged else 'dense'}"
                hip = isinstance(arch, str)
                reports[key] = report_hip(kernel) if hip else report_cuda(kernel, arch)
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
