"""What the compiler makes of the kernels, for GPUs that need not be there.

See kernel_code.py, launch_bindings.py and wide_pointers.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ars.csrc_triton import adam

ROOT = Path(__file__).resolve().parents[2]
CUDA = ("80", "90", "100")
ADAM_EVERYWHERE = [
    f"{name}/{arch}"
    for name in ("fp32", "fp32-coupled", "fp32-compact", "bf16", "master", "pure")
    for arch in CUDA
]
SCALE = 4 / 64  # bytes an element of a compact importance's scale
# Bytes an element of each hot loop, of the tensors with a penalty and of those without; and the
# most registers. 128 threads each: 64 registers leave 1024 threads to a multiprocessor, 88 leave
# 640, 128 leave 512: with the 64 or 96 bytes that each has in flight, more than bandwidth times
# latency asks for.
ADAM: dict[str, tuple[list[float], int]] = {
    "fp32": ([28], 64),
    "fp32-adam": ([28], 64),
    "fp32-amsgrad": ([28 + 8], 64),
    "fp32-coupled": ([36, 28], 88),
    "fp32-proximal": ([36, 28], 88),
    "fp32-bf16-penalty": ([32, 28], 88),
    "bf16": ([22], 64),
    "bf16-proximal": ([22 + 6, 22], 88),
    "fp64-proximal-amsgrad": ([2 * 44, 2 * 36], 112),
    "fp32-pulled": ([28 + 4], 64),
    "fp32-compact": ([28 + 2 + 1 + SCALE, 28], 96),
    "master": ([22 + 4], 64),
    "master-coupled": ([26 + 8, 26], 88),
    "pure": ([14], 88),
    "pure-amsgrad": ([14 + 4], 96),
    "pure-coupled": ([14 + 4, 14], 128),
    "pure-compact": ([14 + 3 + SCALE, 14], 128),
}
CONTROL = (
    "control-norm", "control-norm-bf16", "control-loss", "control-scaled", "control-partials",
    "control-paper", "control-residuals", "control-mean", "control-rate", "control-constant-betas",
)  # fmt: skip
BYTES = {name: moved for name, (moved, _) in ADAM.items()}
REGISTERS = {name: most for name, (_, most) in ADAM.items()} | dict.fromkeys(CONTROL, 80)
REGISTERS["control-partials"] = 64


def run_script(script: str, *, interpret: bool = False) -> dict[str, Any]:
    """Run a script in a process that compiles, or interprets, whatever this one does."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    return run_script("kernel_code.py")


def test_a_kernel_is_compiled_once_whatever_numbers_sizes_and_alignments() -> None:
    assert run_script("launch_bindings.py") == {"adam_kernel": 1, "control_kernel": 1}


def test_only_aligned_operands_are_accessed_wide() -> None:
    """A wide access to a misaligned address is a crash on a GPU, and none at all merely slow."""
    found = run_script("wide_pointers.py", interpret=True)
    blocks, operands, tiles = 8, 9, 1  # of 4096 + 7 elements
    assert found.pop("nothing") == [[[0], blocks * operands], [[0], tiles]]
    assert found.pop("grads") == [[[], 0], [[], 0]]
    assert len(found) == 8
    for steps, norms in found.values():
        assert steps == [[], 0]
        assert norms == [[0], tiles]


def expand(names: Any) -> list[str]:
    return sorted({f"{name}/90" for name in names} | set(ADAM_EVERYWHERE))


def split(loop: list[list[Any]], kind: str) -> list[int]:
    return sorted(size for operation, size, _ in loop if operation == kind)


def elements(key: str) -> int:
    """How many a thread updates in an iteration: 16 bytes of a moment."""
    return 2 if key.startswith("fp64") else 8 if key.startswith("pure") else 4


@pytest.mark.parametrize("key", expand(BYTES))
def test_the_hot_loop_moves_the_stated_bytes_wide_and_unconditionally(
    key: str, reports: dict[str, Any]
) -> None:
    loops = reports[key]["loops"]
    # Threads exchange nothing, neither to convert a layout nor to share random numbers or scales.
    assert reports[key]["exchanges"] == 0
    assert len(loops) == len(BYTES[key.split("/")[0]])
    for index, loop in enumerate(loops):
        # The pull of a tensor that has none is not loaded; the condition is the whole block's.
        conditional = [(kind, size) for kind, size, predicated in loop if predicated]
        assert conditional == ([("LDG", 16)] if "pulled" in key else [])
        # What is half or a quarter as wide as the moments has accesses that are as much narrower.
        narrow = sorted(size for _, size, _ in loop if size < 16)
        if "compact" in key and index == 0:
            for size in (4, elements(key)):  # the scale, and the importance
                narrow.remove(size)
        assert set(narrow) <= ({8} if elements(key) == 4 else set())
        assert split(loop, "LDG").count(16) >= 2
        assert split(loop, "STG").count(16) >= 2
        if key.split("/")[0] in {"fp32", "fp32-pulled", "fp32-coupled", "pure", "pure-coupled"}:
            assert not narrow
    moved = [sum(size for _, size, _ in loop) / elements(key) for loop in loops]
    if "compact" in key:
        moved[0] += SCALE - 4 / elements(key)  # 64 elements' threads load the same one
    assert moved == BYTES[key.split("/")[0]]


@pytest.mark.parametrize("arch", ["80", "90"])
def test_stochastic_rounding_leaves_the_memory_the_bottleneck(
    arch: str, reports: dict[str, Any]
) -> None:
    """An H200 issues 99 instructions an element in the time of 14 bytes at 4.2 TB/s.

    132 multiprocessors of 128 lanes at 1.755 GHz, 300e9 elements a second.
    """
    (instructions,) = reports[f"pure/{arch}"]["instructions"]
    assert instructions / 8 <= 80


def test_the_docstring_states_these_bytes() -> None:
    assert adam.__doc__
    paragraph = re.search(r"^Bytes a parameter.*?^$", adam.__doc__, re.MULTILINE | re.DOTALL)
    assert paragraph
    stated = {int(float(n)) for n in re.findall(r"\b\d+(?:\.\d+)?\b", paragraph[0])}
    assert stated == {28, 36, 32, 31, 22, 26, 14, 8, 4}


CONTROL_EVERYWHERE = [
    f"{name}/{arch}" for name in ("control-norm", "control-constant-betas") for arch in CUDA
]


@pytest.mark.parametrize("key", sorted({*expand(REGISTERS), *CONTROL_EVERYWHERE}))
def test_registers_stay_within_bounds_and_none_is_spilled(
    key: str, reports: dict[str, Any]
) -> None:
    assert reports[key]["registers"] <= REGISTERS[key.split("/")[0]]
    assert reports[key]["local"] == 0


@pytest.mark.parametrize(
    ("name", "loads"),
    [("control-norm", 4), ("control-partials", 4), ("control-norm-bf16", 2), ("control-loss", 0)],
)
def test_the_norm_reads_gradients_by_128_bits(
    name: str, loads: int, reports: dict[str, Any]
) -> None:
    """4096 elements of a tile are 16 for each of 256 threads."""
    assert reports[f"{name}/90"]["wide_loads"] == loads


@pytest.mark.parametrize("name", BYTES)
def test_nothing_is_contracted(name: str, reports: dict[str, Any]) -> None:
    assert reports[f"{name}/90"]["contractions"] == 0


@pytest.mark.parametrize(
    ("name", "tickets"),
    [("fp32", 0), ("fp32-coupled", 1), ("control-norm", 1), ("control-partials", 0),
     ("control-loss", 0)],
)  # fmt: skip
def test_the_last_program_acquires_what_the_others_released(
    name: str, tickets: int, reports: dict[str, Any]
) -> None:
    assert reports[f"{name}/90"]["acquires"] == tickets


@pytest.mark.parametrize(
    ("name", "accesses"),
    [
        ("fp32", 7),
        ("fp32-coupled", 16),
        ("bf16", 4),
        ("fp32-compact", 14),
        ("master", 4),
        ("pure", 7),
        ("control-norm", 4),
    ],
)
def test_amd_code_is_as_wide(name: str, accesses: int, reports: dict[str, Any]) -> None:
    report = reports[f"{name}/gfx942"]
    assert report["wide"] >= accesses
    assert report["spills"] == 0
