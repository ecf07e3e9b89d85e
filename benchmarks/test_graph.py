"""The step as a CUDA graph; collected only where there is a GPU."""

import math

import pytest
import torch
from contest import PLAYED_BACK, Candidate, Contest
from problem import SETTINGS, SHAPES, Weights, check_equal

from ars import ARSAdamW

pytestmark = PLAYED_BACK

BASELINE = "AdamW(fused=True, capturable=True)"


@pytest.fixture(scope="module", params=SHAPES)
def graph(request, device, contest) -> Contest:
    """The step replayed from a CUDA graph; the baseline is AdamW(fused=True, capturable=True)."""
    shapes = SHAPES[request.param]
    made: Contest = contest(f"graph {request.param}", BASELINE, numel=sum(map(math.prod, shapes)))
    options = {"capturable": True, **SETTINGS}
    theirs = torch.optim.AdamW(Weights(shapes, device).parameters(), fused=True, **options)
    ours = ARSAdamW(Weights(shapes, device).parameters(), **options)
    loss = torch.tensor(1.0, device=device)
    for name, step in {BASELINE: theirs.step, "ARSAdamW": lambda: ours.step(loss=loss)}.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        captured.replay()
        made.candidates[name] = Candidate(captured.replay, bytes_moved=28.0)
    made.candidates["ARSAdamW"].check = lambda: check_equal(ours, theirs)
    return made


@pytest.mark.parametrize("name", [BASELINE, "ARSAdamW"])
def test_graph(name, graph, benchmark):
    graph.play(name, benchmark)
