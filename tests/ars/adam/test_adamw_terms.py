"""Bad penalties: refused by the parameter's name, before anything has changed."""

import math

import pytest
import torch
from optimizers import Pull, gradients, parameters

from ars import ARSAdamW

SHAPES = ((5,), (9, 16), (3,))


def spoiled(**changes):
    """A penalty of two named parameters, one entry of the second's term replaced."""
    params = parameters(shapes=((5,), (3, 2)))
    values = torch.ones(3, 2)
    row = {"anchor": torch.zeros(3, 2), "importance": values} | changes
    penalty = Pull(params)
    penalty.rows = [penalty.rows[0], (params[1], *row.values())]
    return list(zip("ab", params, strict=True)), penalty


BYTES = torch.ones(3, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"importance": torch.full((3, 2), math.nan)}, "importance of b .* not finite"),
        ({"importance": torch.full((3, 2), math.inf)}, "importance of b .* not finite"),
        ({"importance": torch.full((3, 2), -1e-9)}, "importance of b .* negative"),
        ({"anchor": torch.full((3, 2), -math.inf)}, "anchor of b .* not finite"),
        ({"importance": BYTES}, "importance of b must be floating, is torch.uint8; .* scale"),
        ({"scale": torch.ones(1)}, "importance of b .* must be uint8, is torch.float32"),
        ({"importance": BYTES, "scale": torch.ones(2)}, r"scale of b .* \(1,\) .* \(2,\)"),
        ({"importance": BYTES, "scale": torch.ones(1).double()}, "scale of b must be float32"),
        ({"importance": BYTES, "scale": torch.tensor([math.nan])}, "importance of b .* finite"),
        ({"importance": BYTES, "scale": torch.tensor([-1.0])}, "importance of b .* negative"),
        (
            {"importance": BYTES.T.contiguous().T, "scale": torch.ones(1)},
            "b, its uint8 importance and their scale must be contiguous",
        ),
        ({"anchor": torch.zeros(3, 3)}, r"anchor of b.*\(3, 3\).*\(3, 2\)"),
        ({"importance": torch.zeros(6)}, r"importance of b has shape \(6,\)"),
        ({"importance": torch.zeros(3, 2).int()}, "importance of b must be floating"),
        ({"importance": torch.zeros(3, 2, device="meta")}, "importance of b is on meta"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_a_bad_term_is_refused_by_name(changes, match):
    named, penalty = spoiled(**changes)
    with pytest.raises(ValueError, match=match):
        ARSAdamW(named, penalty=penalty)
    params = [param for _, param in named]
    optimizer = ARSAdamW(named, penalty=(good := Pull(params)))
    with pytest.raises(ValueError, match=match):
        optimizer.penalty = penalty
    assert optimizer.penalty is good
    gradients(params, 0)
    optimizer.step()
    assert float(optimizer.diagnostics["penalty"]) > 0


@pytest.mark.parametrize(
    ("strength", "error", "match"),
    [
        (-1.0, ValueError, "must be finite and >= 0, got -1.0"),
        (math.nan, ValueError, "must be finite and >= 0, got nan"),
        (math.inf, ValueError, "must be finite and >= 0, got inf"),
        (1e39, ValueError, r"must be at most 1e\+38, as the step .* float32, got 1e\+39"),
        (10**400, ValueError, r"must be at most 1e\+38, .* got 1000"),
        (torch.tensor(2e38), ValueError, r"must be at most 1e\+38, .* got 1\.99\d*e\+38"),
        (torch.tensor(-2.0), ValueError, "must be finite and >= 0, got -2.0"),
        (torch.ones(2), ValueError, r"must be one floating-point number, .* \(2,\)"),
        (torch.tensor(1), ValueError, "must be one floating-point number, is torch.int64"),
        ("1", TypeError, "must be a number or a 0-d tensor, got str"),
        (True, TypeError, "must be a number"),
    ],
    ids=str,
)
def test_a_bad_strength_is_refused_when_it_is_set_and_when_it_is_used(strength, error, match):
    params = parameters(shapes=SHAPES)
    with pytest.raises(error, match="penalty strength " + match):
        ARSAdamW(params, penalty=Pull(params, strength=strength))
    with pytest.raises(error, match="penalty_strength " + match):
        ARSAdamW([{"params": params, "penalty_strength": strength}])
    optimizer = ARSAdamW(params, penalty=Pull(params))
    gradients(params, 0)
    optimizer.penalty.strength = strength
    before = [param.detach().clone() for param in params]
    with pytest.raises(error, match="penalty strength " + match):
        optimizer.step()
    optimizer.penalty.strength = 1.0
    optimizer.param_groups[0]["penalty_strength"] = strength
    with pytest.raises(error, match="penalty_strength " + match):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state


def test_terms_that_are_of_no_parameter_or_of_one_twice():
    params = parameters(shapes=SHAPES)
    penalty = Pull(params)
    penalty.mode = "soft"
    with pytest.raises(ValueError, match="mode must be 'coupled' or 'proximal', got 'soft'"):
        ARSAdamW(params, penalty=penalty)
    penalty.mode, penalty.rows = "coupled", [*penalty.rows, penalty.rows[0]]
    with pytest.raises(ValueError, match="two terms for parameter 0 of group 0"):
        ARSAdamW(params, penalty=penalty)
    penalty.rows = [(torch.zeros(5), torch.zeros(5), torch.zeros(5))]
    with pytest.raises(ValueError, match=r"shape \(5,\) .* not from a copy"):
        ARSAdamW(params, penalty=penalty)
    # A real anchor of a complex shape would be broadcast over real and imaginary parts.
    wave = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    penalty.rows = [(wave, torch.zeros(2), torch.ones(2))]
    with pytest.raises(ValueError, match=r"wave is complex, and only real .*: leave it out"):
        ARSAdamW([("wave", wave)], penalty=penalty)
