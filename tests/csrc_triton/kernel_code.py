"""Compile the kernels for GPUs that need not be there, and print what the machine code says.

Run as a script, without TRITON_INTERPRET: ``python kernel_code.py`` prints a JSON object,
``"variant/architecture" -> report``.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ars.csrc_triton import adam, control, launches, rounding, update
from ars.csrc_triton.tiles import TILE

# Every variant is compiled for the first; those of EVERYWHERE for all.
ARCHITECTURES = (90, 80, 100, "gfx942")
EVERYWHERE = (
    "fp32", "fp32-coupled", "fp32-compact", "bf16", "master", "pure", "control-norm",
    "control-constant-betas",
)  # fmt: skip
BIN = Path(triton.backends.nvidia.__file__).parent / "bin"

NO_PENALTY, COUPLED, PROXIMAL = (
    kind.value for kind in (adam.NO_PENALTY, adam.COUPLED, adam.PROXIMAL)
)
OPERANDS = ("PARAM", "MOMENT", "ANCHOR", "IMPORTANCE")
FLOAT = dict.fromkeys(OPERANDS, tl.float32)
BF16 = FLOAT | {"PARAM": tl.bfloat16}
DOUBLE = dict.fromkeys(OPERANDS, tl.float64)
COMPACT = {"PENALTY": COUPLED, "ANCHOR": tl.bfloat16, "IMPORTANCE": tl.uint8}
MASTER = BF16 | {"ROUNDING": rounding.MASTER.value}
PURE = dict.fromkeys(OPERANDS, tl.bfloat16) | {"ROUNDING": rounding.STOCHASTIC.value}
ADAM: dict[str, dict[str, Any]] = {
    "fp32": FLOAT,
    "fp32-adam": FLOAT | {"DECOUPLED": False},
    "fp32-amsgrad": FLOAT | {"AMSGRAD": True},
    "fp32-coupled": FLOAT | {"PENALTY": COUPLED},
    "fp32-proximal": FLOAT | {"PENALTY": PROXIMAL},
    "fp32-bf16-penalty": FLOAT | {
        "PENALTY": COUPLED, "ANCHOR": tl.bfloat16, "IMPORTANCE": tl.bfloat16,
    },
    "bf16": BF16,
    "bf16-proximal": BF16 | {"PENALTY": PROXIMAL, "ANCHOR": tl.bfloat16},
    "fp32-pulled": FLOAT | {"PULLED": True},
    "fp32-compact": FLOAT | COMPACT,
    "master": MASTER,
    "master-coupled": MASTER | {"PENALTY": COUPLED},
    "pure": PURE,
    "pure-amsgrad": PURE | {"AMSGRAD": True},
    "pure-coupled": PURE | {"PENALTY": COUPLED},
    "pure-compact": PURE | COMPACT,
    "fp64-proximal-amsgrad": DOUBLE | {"PENALTY": PROXIMAL, "AMSGRAD": True},
}  # fmt: skip
NUMBERS = ("loss", "grad_scale", "found_inf")  # optional pointers, at any alignment
CONTROL: dict[str, dict[str, Any]] = {
    "control-norm": {},
    "control-norm-bf16": {"GRAD": tl.bfloat16},
    "control-loss": {"NORM": False, "loss": "*fp32"},
    "control-scaled": {"grad_scale": "*fp32", "found_inf": "*fp32"},
    "control-partials": {"LAST": False},
    "control-paper": {"STANDARDIZE": False, "DETREND": False, "GATE_LR": False, "GATE_GRAD": False},
    "control-residuals": {"STANDARDIZE": False},
    "control-mean": {"DETREND": False},
    "control-rate": {"GATE_BETAS": False, "GATE_GRAD": False},  # the default
    "control-constant-betas": {
        "GATED": False,
        "GATE_BETAS": False,
        "GATE_LR": False,
        "GATE_GRAD": False,
        "window": None,
        "counts": None,
        "gate_state": None,
        "config": None,
    },
}
POINTERS = {
    "table": "*i64", "grad_table": "*i64", "tiles": "*i32", "partials": "*fp64",
    "ticket": "*i32", "diagnostics": "*fp64", "hyper": "*fp64", "window": "*fp64",
    "counts": "*i64", "gate_state": "*fp64", "config": "*fp64", "seed": "*i64",
}  # fmt: skip


def build(
    kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], target: GPUTarget, warps: int
) -> Any:
    """Compile with the options of every launch; ``constants`` are the constexpr arguments."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else arguments.get(name, "i32")
        if signature[name].startswith("*") and name not in NUMBERS:
            attributes[index,] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    warps = warps * launches.WARP // target.warp_size  # as many threads as on this machine
    return triton.compile(source, target=target, options=launches.OPTIONS | {"num_warps": warps})


def build_adam(variant: dict[str, Any], target: GPUTarget) -> Any:
    double = variant["MOMENT"] == tl.float64
    constants = {
        "AMSGRAD": False, "DECOUPLED": True, "PENALTY": NO_PENALTY, "PULLED": False,
        "ROUNDING": rounding.NEAREST.value, "LAST": True, "TILE": TILE,
        "BLOCK": launches.BLOCK_BYTES * 8 // variant["MOMENT"].primitive_bitwidth,
        "SUM_BLOCK": launches.SUM_BLOCK,
    } | variant  # fmt: skip
    number = "*fp64" if double else "*fp32"
    arguments = POINTERS | {"scalars": number, "corrections": number}
    return build(update.adam_kernel, arguments, constants, target, launches.ADAM_WARPS)


def build_control(variant: dict[str, Any], target: GPUTarget) -> Any:
    constants = {
        "GRAD": tl.float32, "NORM": True, "LAST": True, "GATED": True, "STANDARDIZE": True,
        "DETREND": True, "GATE_BETAS": True, "GATE_LR": True, "GATE_GRAD": True, "DECOUPLED": True,
        "WINDOW": 100, "WINDOW_BLOCK": 128, "GROUP_BLOCK": 2,
        "TENSOR_BLOCK": launches.TENSOR_BLOCK, "TILE": TILE, "SUM_BLOCK": launches.SUM_BLOCK,
    } | dict.fromkeys(NUMBERS) | variant  # fmt: skip
    arguments = POINTERS | {"scalars": "*fp32", "corrections": "*fp32"}
    arguments |= {name: constants.pop(name) for name in NUMBERS if constants[name] is not None}
    return build(control.control_kernel, arguments, constants, target, launches.CONTROL_WARPS)


def tool(name: str, *args: str) -> str:
    done = subprocess.run([BIN / name, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


Loop = list[tuple[str, int, bool]]


def hot_loops(sass: str) -> tuple[list[Loop], list[int], int]:
    """Of each loop that has a 128-bit access: its global accesses, and how many instructions.

    An access is (LDG or STG, bytes, predicated). The last number is of accesses to shared memory
    and of barriers in all these loops.
    """
    lines = sass.splitlines()
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L")}
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA(?:\.U)? .*`\((\.L\w+)\)", line)
        if target and labels[target[1]] < end:
            loops.append(lines[labels[target[1]] : end])
    found, lengths, exchanges = [], [], 0
    for body in loops:
        accesses = []
        for line in body:
            access = re.search(r"(@!?U?P\d+ +)?\b(LDG|STG)\.E((?:\.\w+)*)", line)
            if access:
                suffixes = access[3].split(".")
                size = 16 if "128" in suffixes else 8 if "64" in suffixes else 4
                size = 2 if {"U16", "S16"} & set(suffixes) else size
                size = 1 if {"U8", "S8"} & set(suffixes) else size
                accesses.append((access[2], size, access[1] is not None))
        if any(size == 16 for _, size, _ in accesses):
            found.append(accesses)
            lengths.append(
                sum(re.search(r"/\*[0-9a-f]{4,}\*/ ", line) is not None for line in body)
            )
            exchanges += sum(
                re.search(r"\b(LDS|STS|SHFL|BAR)\b", line) is not None for line in body
            )
    return found, lengths, exchanges


def disassembled(kernel: Any) -> tuple[str, dict[str, int]]:
    """Return the machine code for CUDA; the registers, and the accesses to local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", str(path))
        sass = tool("nvdisasm", "-c", str(path))
    numbers = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    local = numbers["STACK"] + numbers["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return sass, {"registers": numbers["REG"], "local": local}


def report_cuda(kernel: Any) -> dict[str, Any]:
    sass, usage = disassembled(kernel)
    loops, instructions, exchanges = hot_loops(sass)
    return usage | {
        "loops": loops,
        "instructions": instructions,
        "exchanges": exchanges,
        "wide_loads": len(re.findall(r"\bLDG\.E\.128\b", sass)),
        "contractions": len(re.findall(r"\bfma\.\w", kernel.asm["ptx"])),
        "acquires": len(re.findall(r"\batom\.global\.gpu\.acq_rel\.add", kernel.asm["ptx"])),
    }


def report_hip(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]
    return {
        "spills": sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", code))),
        "wide": len(re.findall(r"\bglobal_(?:load|store)_dwordx4\b", code)),
    }


def main() -> None:
    reports = {}
    for builder, variants in ((build_adam, ADAM), (build_control, CONTROL)):
        for name, variant in variants.items():
            for arch in ARCHITECTURES if name in EVERYWHERE else ARCHITECTURES[:1]:
                hip = isinstance(arch, str)
                target = GPUTarget("hip" if hip else "cuda", arch, 64 if hip else 32)
                kernel = builder(variant, target)
                reports[f"{name}/{arch}"] = (report_hip if hip else report_cuda)(kernel)
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
