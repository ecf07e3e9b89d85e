"""What only a GPU shows of the per-sample squares: races, waiting, memory, 2^31 elements."""

import pytest
import torch
from torch import nn

from ars.csrc_triton.fisher import add_squared_products_
from ars.reference import squared_products
from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher.rules import add_squared_products_ as dispatched
from waiting import waiting_refused

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TOLERANCE = 1e-5


def operands(samples, positions, p, d, dtype=torch.bfloat16):
    return (
        torch.randn(samples, positions, p, device=DEVICE).to(dtype),
        torch.randn(samples, positions, d, device=DEVICE).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 256, 768, 768), (3, 1000, 2304, 768), (64, 33, 256, 1000)])
def test_large_matrices_equal_the_definition(shape, dtype):
    g, a = operands(*shape, dtype=dtype)
    exact = squared_products(g.double(), a.double())
    for add in (add_squared_products_, dispatched):
        total = torch.zeros(shape[2:], device=DEVICE)
        add(total, g, a)
        assert (total.double() - exact).abs().max() <= TOLERANCE * exact.max()


def test_ways_of_half_precision_agree():
    g, a = operands(4, 64, 128, 136)  # small: a scratch, multiplied into fp32
    total = torch.zeros(128, 136, device=DEVICE)
    dispatched(total, g, a.float())
    exact = squared_products(g.double(), a.double())
    assert (total.double() - exact).abs().max() <= TOLERANCE * exact.max()
    large = torch.zeros(2048, 2304, device=DEVICE)  # one sample at a time
    g, a = operands(2, 4000, 2048, 2304)
    dispatched(large, g, a)
    exact = squared_products(g.double(), a.double())
    assert (large.double() - exact).abs().max() <= TOLERANCE * exact.max()


def test_splits_have_no_races():
    g, a = operands(50, 64, 256, 256)
    seen = []
    for _ in range(20):
        total = torch.zeros(256, 256, device=DEVICE)
        add_squared_products_(total, g, a)
        seen.append(total)
    assert all(torch.equal(total, seen[0]) for total in seen)


def test_a_launch_does_not_wait_for_the_device():
    g, a = operands(8, 64, 512, 512)
    offsets = torch.arange(0, 513, 64, device=DEVICE)
    total = torch.zeros(512, 512, device=DEVICE)
    add_squared_products_(total, g, a)
    add_squared_products_(total, g.flatten(0, 1), a.flatten(0, 1), offsets)
    torch.cuda.synchronize()
    with waiting_refused():
        add_squared_products_(total, g, a)
        add_squared_products_(total, g.flatten(0, 1), a.flatten(0, 1), offsets)


def test_a_large_matrix_needs_no_memory_beside_its_sum():
    g, a = operands(16, 128, 4096, 4096)
    total = torch.zeros(4096, 4096, device=DEVICE)
    add_squared_products_(total, g, a)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add_squared_products_(total, g, a)
    assert torch.cuda.max_memory_allocated() == before


def test_more_elements_than_an_int32_counts():
    """Needs 9 GB: all but the last two samples are 0."""
    samples, positions, p, d = 2100, 1024, 1024, 16
    g = torch.zeros(samples, positions, p, dtype=torch.bfloat16, device=DEVICE)
    assert g.numel() > 2**31
    a = torch.ones(1, positions, d, dtype=torch.bfloat16, device=DEVICE)
    g[-2:] = torch.randn(2, positions, p, device=DEVICE).bfloat16()
    total = torch.zeros(p, d, device=DEVICE)
    add_squared_products_(total, g, a.expand(samples, positions, d))
    exact = squared_products(g[-2:].double(), a.expand(2, positions, d).double())
    assert (total.double() - exact).abs().max() <= TOLERANCE * exact.max()


def test_a_fisher_on_the_device_is_the_fisher_on_the_host():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(50, 256), nn.LayerNorm(256), nn.Linear(256, 512), nn.GELU(),
        nn.Linear(512, 50),
    )  # fmt: skip
    x = torch.randint(50, (6, 32))
    host = DiagonalFisher(model, "empirical").fit([(x, x.roll(1))]).importance
    on_device = model.to(DEVICE)
    batch = x.to(DEVICE), x.roll(1).to(DEVICE)
    fisher = DiagonalFisher(on_device, "empirical", method="hooks")
    full = fisher.fit([batch]).importance
    again = fisher.fit([batch]).importance
    with torch.autocast(DEVICE, torch.bfloat16):
        half = fisher.fit([batch]).importance
    for name, tensor in host.items():
        assert (full[name].cpu() - tensor).abs().max() <= 1e-3 * tensor.max()
        assert (half[name].cpu() - tensor).norm() <= 0.1 * tensor.norm()
        assert torch.equal(full[name], again[name])
