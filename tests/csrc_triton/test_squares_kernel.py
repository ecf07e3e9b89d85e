"""The kernel of the per-sample squares against its definition: in the interpreter, or on a GPU."""

import pytest
import torch

from ars.csrc_triton import fisher
from ars.csrc_triton.fisher import add_squared_products_
from ars.reference import squared_products

# Relative to the largest entry: fp32 sums of T products in another order, squared.
TOLERANCE = 2e-6


def operands(rows, p, d, dtype, device):
    g, a = torch.randn(*rows, p, device=device), torch.randn(*rows, d, device=device)
    return g.to(dtype), a.to(dtype)


def assert_adds(total, g, a, offsets=None, splits=None):
    exact = squared_products(g.double(), a.double(), offsets)
    expected = total.double() + exact
    add_squared_products_(total, g, a, offsets, splits=splits)
    assert (total.double() - expected).abs().max() <= TOLERANCE * exact.max().clamp(min=1)


@pytest.mark.parametrize("splits", [None, 1, 2, 3])
@pytest.mark.parametrize("dtype", fisher.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_equals_the_definition(dtype, splits, device):
    g, a = operands((3, 70), 130, 33, dtype, device)  # neither whole tiles nor whole blocks of T
    assert_adds(torch.rand(130, 33, device=device), g, a, splits=splits)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 64, 128, 128), (2, 65, 129, 1), (4, 3, 16, 257), (2, 16, 1100, 20)]
)
def test_shapes_at_the_edges_of_tiles(shape, device):
    *rows, p, d = shape
    g, a = operands(rows, p, d, torch.bfloat16, device)
    assert_adds(torch.zeros(p, d, device=device), g, a)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_ragged_samples(splits, device):
    offsets = torch.tensor([0, 37, 37, 38, 110], device=device)  # one sample is empty
    g, a = operands((110,), 40, 20, torch.bfloat16, device)
    assert_adds(torch.ones(40, 20, device=device), g, a, offsets, splits)


def test_ragged_samples_of_one_length_are_the_same_bits(device):
    g, a = operands((3, 20), 40, 20, torch.float16, device)
    dense, ragged = torch.zeros(40, 20, device=device), torch.zeros(40, 20, device=device)
    add_squared_products_(dense, g, a)
    offsets = torch.arange(0, 61, 20, device=device)
    add_squared_products_(ragged, g.flatten(0, 1), a.flatten(0, 1), offsets)
    assert torch.equal(dense, ragged)


def test_strided_operands(device):
    g, a = operands((3, 20, 2), 40, 24, torch.bfloat16, device)
    assert_adds(torch.zeros(40, 24, device=device), g[:, :, 1], a[:, :, 0])
    assert_adds(torch.zeros(20, 24, device=device), g[:, :, 1, ::2], a[:, :, 0])
    assert_adds(torch.zeros(40, 24, device=device), g[:, :, 1].mT.contiguous().mT, a[:, :, 0])
    same = g[:1, :, 0].expand(3, 20, 40)
    assert_adds(torch.zeros(40, 24, device=device), same, a[:, :, 0])


@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_beside_the_sum_is_written(splits, device):
    whole = torch.full((3, 130, 33), 7.0, device=device)
    g, a = operands((3, 18), 130, 33, torch.bfloat16, device)
    add_squared_products_(whole[1], g, a, splits=splits)
    assert (whole[0] == 7).all()
    assert (whole[2] == 7).all()


def test_the_same_splits_give_the_same_bits(device):
    g, a = operands((7, 40), 130, 140, torch.bfloat16, device)
    totals = [torch.zeros(130, 140, device=device) for _ in range(3)]
    for total in totals:
        add_squared_products_(total, g, a, splits=3)
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])


def test_half_precision_products_are_squared_and_summed_in_fp32(device):
    """1e-4 squared is 0 in fp16, and a bf16 sum of equal terms stops at 256 of them."""
    g = torch.full((300, 2, 16), 5e-5, dtype=torch.float16, device=device)
    a = torch.ones(300, 2, 16, dtype=torch.float16, device=device)
    total = torch.zeros(16, 16, device=device)
    add_squared_products_(total, g, a)
    expected = 300 * (2 * float(g[0, 0, 0])) ** 2
    torch.testing.assert_close(total, torch.full_like(total, expected), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("rows", [(0, 5), (5, 0)])
def test_nothing_is_added_for_no_samples_or_positions(rows, device):
    total = torch.ones(4, 3, device=device)
    add_squared_products_(total, *operands(rows, 4, 3, torch.bfloat16, device))
    assert (total == 1).all()


def test_partial_sums_fit_in_their_workspace(monkeypatch, device):
    class Large:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Large)
    gpu = torch.device("cuda")
    assert fisher._splits(64, 36, 768 * 768, gpu) == 3  # 36 tiles leave 96 of 132 idle
    assert fisher._splits(2, 36, 768 * 768, gpu) == 2
    assert fisher._splits(64, 132, 1, gpu) == 1
    assert fisher._splits(64, 200, 1, gpu) == 1
    assert fisher._splits(64, 1, 2**22, gpu) == 4
    assert fisher._splits(64, 1, 2**26, gpu) == 1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"total": torch.zeros(4, 3).double()}, ValueError, "total is torch.float64"),
        ({"total": torch.zeros(3, 4).t()}, ValueError, "must be contiguous float32"),
        ({"g": torch.zeros(2, 5, 4)}, TypeError, "g is torch.float32 and a torch.bfloat16"),
        ({"g": torch.zeros(2, 5, 4).double(), "a": torch.zeros(2, 5, 3).double()}, TypeError,
         "convert both"),
        ({"g": torch.zeros(2, 5, 4, device="meta").bfloat16()}, ValueError, "g is on meta"),
        ({"g": torch.zeros(2, 6, 4).bfloat16()}, ValueError, "do not fit"),
        ({"offsets": torch.tensor([0, 10])}, ValueError, "do not fit"),
        ({"g": torch.zeros(5, 4).bfloat16(), "a": torch.zeros(5, 3).bfloat16(),
          "offsets": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "contiguous int64"),
    ],
)  # fmt: skip
def test_refuses_what_it_cannot_read(change, error, match, device):
    arguments = {
        "total": torch.zeros(4, 3),
        "g": torch.zeros(2, 5, 4).bfloat16(),
        "a": torch.zeros(2, 5, 3).bfloat16(),
    } | change
    moved = {n: t if t.is_meta else t.to(device) for n, t in arguments.items()}
    with pytest.raises(error, match=match):
        add_squared_products_(**moved)
