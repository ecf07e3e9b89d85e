"""What the compiler makes of the per-sample squares, for GPUs that need not be there."""

from typing import Any

import pytest
from test_fused_codegen import run_script

from ars.csrc_triton import fisher

KINDS = ("bf16/{}/dense", "bf16/{}/ragged", "fp16/{}/dense", "fp32/{}/dense")
# Bytes of shared memory that a block may have.
SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}
EVERY = [kind.format(arch) for kind in KINDS for arch in SHARED]


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    return run_script("squares_code.py")


@pytest.mark.parametrize("key", EVERY)
def test_nothing_is_spilled_and_no_order_is_left_to_chance(
    key: str, reports: dict[str, Any]
) -> None:
    report = reports[key]
    assert report["local"] == 0
    assert report["atomics"] == 0
    assert report["shared"] <= SHARED[key.split("/")[1]]


@pytest.mark.parametrize("key", [key for key in EVERY if key != "fp32/gfx942/dense"])
def test_tensor_cores_multiply_half_precision_and_round_no_fp32_to_tf32(
    key: str, reports: dict[str, Any]
) -> None:
    assert (reports[key]["tensor_core"] > 0) == ("fp32" not in key)


@pytest.mark.parametrize("key", [key for key in EVERY if "gfx" not in key])
def test_operands_are_copied_by_128_bits_behind_the_products(
    key: str, reports: dict[str, Any]
) -> None:
    assert reports[key]["copies"] == ["128"]
    # One block of 256 threads to a multiprocessor, whose 65536 registers are 256 a thread.
    assert reports[key]["registers"] <= 240


def test_blocks_of_positions() -> None:
    assert fisher.block_t(2, (8, 0)) == 32
    assert fisher.block_t(2, (9, 0)) == fisher.block_t(2, (10, 0)) == 64
    assert fisher.block_t(2, None) == 32
    assert fisher.block_t(4, (9, 0)) == 16
