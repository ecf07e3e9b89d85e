"""The per-sample squares of a matrix's gradient: definition, and every way to add them up."""

import itertools

import pytest
import torch

from ars.reference import squared_products
from ars.regularizers.fisher import rules
from ars.regularizers.fisher.rules import add_squared_products_


def operands(samples, positions, p, d, dtype=torch.float64):
    return (
        torch.randn(samples, positions, p, dtype=dtype),
        torch.randn(samples, positions, d, dtype=dtype),
    )


def test_definition_is_the_square_of_autograd_gradients():
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x, g = torch.randn(5, 6, 4, dtype=torch.float64), torch.randn(5, 6, 3, dtype=torch.float64)
    expected = sum(
        torch.autograd.grad(xs @ weight.T, weight, gs)[0].square()
        for xs, gs in zip(x, g, strict=True)
    )
    torch.testing.assert_close(squared_products(g, x), expected)


@pytest.mark.parametrize("shared", [0, 2**14], ids=["alone", "shared"])
@pytest.mark.parametrize("scratch", [1, 9, 40, 2**18])
@pytest.mark.parametrize(
    "sizes", [(5, 1, 3, 4), (5, 6, 3, 4), (1, 6, 3, 4), (7, 2, 1, 9), (0, 6, 3, 4), (5, 0, 3, 4)]
)
def test_adds_to_what_is_there(sizes, scratch, shared, monkeypatch):
    monkeypatch.setitem(rules.SHARED, "cpu", shared)
    monkeypatch.setitem(rules.SCRATCH, "cpu", scratch)
    g, a = operands(*sizes)
    total = torch.rand(sizes[2:], dtype=torch.float64)
    expected = total + squared_products(g, a)
    add_squared_products_(total, g, a)
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("positions", [1, 6])
def test_operands_of_half_precision_are_multiplied_in_the_precision_of_the_sum(positions):
    g, a = (t.bfloat16() for t in operands(5, positions, 3, 4))
    total = torch.zeros(3, 4)
    add_squared_products_(total, g, a)
    expected = squared_products(g.double(), a.double()).float()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


def test_ragged_samples():
    g, a = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    bounds = [0, 2, 2, 3, 9]
    expected = sum((g[i:j].T @ a[i:j]).square() for i, j in itertools.pairwise(bounds))
    offsets = torch.tensor(bounds)
    torch.testing.assert_close(squared_products(g, a, offsets), expected)
    total = torch.ones(3, 4, dtype=torch.float64)
    add_squared_products_(total, g, a, offsets)
    torch.testing.assert_close(total, expected + 1)


def test_a_part_of_a_larger_sum_is_added_to_in_place():
    g, a = operands(4, 5, 3, 2)
    whole = torch.zeros(2, 3, 2, dtype=torch.float64)
    add_squared_products_(whole[1], g, a)
    torch.testing.assert_close(whole[1], squared_products(g, a))
    assert (whole[0] == 0).all()


@pytest.mark.parametrize(
    ("g", "a", "total", "offsets", "match"),
    [
        ((4, 5, 3), (4, 5, 2), (2, 3), None, r"do not fit; expected \(N, T, p\)"),
        ((4, 5, 3), (4, 6, 2), (3, 2), None, "do not fit"),
        ((5, 3), (5, 2), (3, 2), None, "do not fit"),
        ((4, 5, 3), (4, 5, 2), (3, 2), [0, 4], r"expected \(rows, p\)"),
        ((5, 3), (5, 2), (3, 2), [0, 4], "rise from 0 to the 5 rows"),
        ((5, 3), (5, 2), (3, 2), [1, 5], "rise from 0"),
        ((5, 3), (5, 2), (3, 2), [0, 3, 2, 5], "rise from 0"),
        ((5, 3), (5, 2), (3, 2), [], "rise from 0"),
    ],
)
def test_refuses_what_does_not_fit(g, a, total, offsets, match):
    offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int64)
    result = torch.zeros(total)
    with pytest.raises(ValueError, match=match):
        add_squared_products_(result, torch.ones(g), torch.ones(a), offsets)
    assert (result == 0).all()


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        ("kernel", {}),
        ("kernel", {"dtype": torch.float16, "positions": 2}),
        ("scratch", {"dtype": torch.float32}),
        ("scratch", {"positions": 4096}),
        ("scratch", {"numel": 128 * 128}),
        ("scratch", {"aligned": False}),
        ("scratch", {"device": torch.device("cpu")}),
        ("squared", {"positions": 1}),
        ("squared", {"positions": 1, "device": torch.device("cpu")}),
    ],
)
def test_the_way_is_chosen_by_shape_dtype_and_device(expected, change):
    usual = {
        "device": torch.device("cuda"), "dtype": torch.bfloat16, "positions": 1024,
        "numel": 768 * 768, "aligned": True,
    }  # fmt: skip
    assert rules.choose_squares(**usual | change) == expected
