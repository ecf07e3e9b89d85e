"""The step as a CUDA graph; collected only where there is a GPU."""

import math

import pytest
import torch
from problem import SETTINGS, SHAPES, Weights, check_equal, measure

from ars import ARSAdamW


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_graph(shapes, device, copy_bandwidth, report, request):
    """The step replayed from a CUDA graph; the baseline is AdamW(fused=True, capturable=True)."""
    baseline = "AdamW(fused=True, capturable=True)"
    options = {"capturable": True, **SETTINGS}
    optimizers = {
        baseline: torch.optim.AdamW(Weights(shapes, device).parameters(), fused=True, **options),
        "ARSAdamW": ARSAdamW(Weights(shapes, device).parameters(), **options),
    }
    loss = torch.tensor(1.0, device=device)
    steps = {
        baseline: optimizers[baseline].step,
        "ARSAdamW": lambda: optimizers["ARSAdamW"].step(loss=loss),
    }
    candidates = {}
    for name, step in steps.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        candidates[name] = graph.replay
        graph.replay()
    check_equal(optimizers["ARSAdamW"], optimizers[baseline])
    rows = measure(
        candidates, baseline, dict.fromkeys(candidates, 28.0),
        numel=sum(map(math.prod, shapes)), device=device, copy_bandwidth=copy_bandwidth,
    )  # fmt: skip
    report(f"graph {request.node.callspec.id}".replace(" ", "-"), rows)
