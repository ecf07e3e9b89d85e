"""The diagonal Fisher of one small model of each family: the way that `auto` takes, and others.

Every way is compared with the loop over samples first. Models are random; transformers' are left
out where it is not installed.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from contest import PLAYED_BACK, Candidate, Contest
from fisher_families import TRANSFORMERS, batch_of, forward_backward, model_of
from step_peers import quiet
from torch import Tensor

from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import diagonal

pytestmark = PLAYED_BACK

BASELINE = "forward + backward"
WIDTH, LENGTH, BATCH, BATCHES = 64, 16, 8, 2
OURS = 1e-4  # float32 rounding of squares, relative to each tensor's largest entry
ROUNDS = 3
FAMILIES = [*TRANSFORMERS, "convnet", "mlp"]
WAYS = ("auto", "hooks", "vmap", "loop")


def on(device: str, batch: Any) -> Any:
    """Move a batch."""
    if isinstance(batch, dict):
        return {key: tensor.to(device) for key, tensor in batch.items()}
    return tuple(tensor.to(device) for tensor in batch)


def way_taken(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the way that a fit has ended with."""
    seen: list[str] = []

    class Watched(diagonal.Differentiator):
        def add_squares(self, *args: Any) -> None:
            super().add_squares(*args)
            seen.append(self._current_method)

    with monkeypatch.context() as patched:
        patched.setattr(diagonal, "Differentiator", Watched)
        run()
    return seen[-1]


def largest_error(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest deviation relative to a tensor's largest entry, if it is no rounding."""
    least = 1e-9 * max(float(tensor.max()) for tensor in expected.values())
    return max(
        float((result[name] - tensor).abs().max() / tensor.max().clamp(min=least))
        for name, tensor in expected.items()
    )


@pytest.fixture(scope="module", params=FAMILIES)
def families(request, device, contest) -> Contest:
    """The empirical Fisher; the baseline is one forward and backward pass of the same batches."""
    family = request.param
    if family in TRANSFORMERS and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    made: Contest = contest(f"fisher of {family}", BASELINE, rounds=ROUNDS, count_costs=False)
    model = model_of(family, WIDTH, LENGTH).to(device)
    batches = [on(device, batch_of(family, WIDTH, LENGTH, BATCH)) for _ in range(BATCHES)]
    made.candidates[BASELINE] = Candidate(lambda: forward_backward(model, batches))
    runs = {}
    for way in WAYS:
        fisher = DiagonalFisher(copy.deepcopy(model), "empirical", method=way)
        runs[way] = lambda fisher=fisher: quiet(lambda: fisher.fit(batches).importance)
    expected = runs["loop"]()
    for way, run in runs.items():
        if way in {"hooks", "vmap"}:
            try:
                run()
            except RuntimeError as error:
                made.left_out[way] = str(error)[:160]
                continue

        def check(run=run) -> dict[str, float]:
            error = largest_error(run(), expected)
            assert error < OURS, f"the largest error is {error:.1e}, the bound {OURS:.0e}"
            return {"largest error": error, "bound": OURS}

        made.candidates[way] = Candidate(run, check=check)
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.notes["auto"] = {"way": way_taken(runs["auto"], monkeypatch)}
    return made


@pytest.mark.parametrize("name", [BASELINE, *WAYS])
def test_fisher_of_family(name, families, benchmark):
    families.play(name, benchmark)
