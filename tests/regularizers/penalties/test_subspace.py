"""The subspace penalty against dense float64 projectors, autograd, and its own contract."""

import math

import pytest
import torch
from ewc_models import move
from torch import nn

from ars.regularizers import SubspacePenalty

CASES = [
    (side, protect, kind)
    for side in ("input", "output")
    for protect in ("inside", "outside")
    for kind in ("dense", "coordinates")
]


def conv_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(20, 6)).to(dtype)


def random_bases(model, side, kind, k=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    bases = {}
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            d = len(p) if side == "output" else p[0].numel()
            if kind == "dense":
                random = torch.randn(d, k, generator=generator, dtype=torch.float64)
                bases[name] = torch.linalg.qr(random).Q
            else:
                bases[name] = torch.randperm(d, generator=generator)[:k]
    return bases


def dense_part(delta, basis, side, protect):
    """Q dW or dW Q with the d x d projector, in float64."""
    matrix = delta.double().flatten(1)
    d = len(matrix) if side == "output" else matrix.shape[1]
    unit = basis.double() if basis.is_floating_point() else torch.eye(d).double()[:, basis]
    projector = unit @ unit.T
    if protect == "outside":
        projector = torch.eye(d).double() - projector
    part = projector @ matrix if side == "output" else matrix @ projector
    return part.view(delta.shape)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
@pytest.mark.parametrize(("side", "protect", "kind"), CASES)
def test_value_and_buffers_are_those_of_the_dense_projector(side, protect, kind, dtype, rtol):
    model = conv_model(dtype)
    bases = random_bases(model, side, kind)
    penalty = SubspacePenalty(model, bases, 3.0, side=side, protect=protect)
    assert penalty.value().item() == penalty.refresh().item() == 0.0
    move(model)
    named = dict(model.named_parameters())
    parts = {
        n: dense_part(named[n].detach().double() - penalty.anchor[n].double(), u, side, protect)
        for n, u in bases.items()
    }
    expected = 3.0 * sum(float(part.square().sum()) for part in parts.values())
    assert penalty.value().item() == pytest.approx(expected, rel=rtol)
    assert penalty.refresh().item() == pytest.approx(expected, rel=rtol)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for (name, part), (param, buffer) in zip(parts.items(), penalty.gradients(), strict=True):
        assert param is named[name]
        assert buffer.dtype == wide
        assert buffer.shape == param.shape
        torch.testing.assert_close(buffer.double(), 6.0 * part, rtol=10 * rtol, atol=10 * rtol)
    assert (penalty.mode, list(penalty.terms())) == ("coupled", [])
    penalty.value().backward()
    for param, buffer in penalty.gradients():
        assert not buffer.requires_grad
        if dtype == torch.float64:
            torch.testing.assert_close(param.grad, buffer, rtol=1e-12, atol=1e-12)
    assert model[0].bias.grad is None


def test_refresh_allocates_nothing_that_stays_and_ignores_autocast():
    model = conv_model(torch.float32)
    penalty = SubspacePenalty(model, random_bases(model, "input", "dense"))
    move(model)
    addresses = [buffer.data_ptr() for _, buffer in penalty.gradients()]
    expected = penalty.refresh().item()
    with torch.autocast("cpu", torch.bfloat16):
        assert penalty.refresh().item() == expected
        assert penalty.value().item() == pytest.approx(expected, rel=1e-6)
    assert [buffer.data_ptr() for _, buffer in penalty.gradients()] == addresses


def test_weights_that_are_not_contiguous_keep_their_strides():
    model = conv_model().to(memory_format=torch.channels_last)
    bases = random_bases(model, "input", "dense")
    penalty = SubspacePenalty(model, bases, 0.5)
    move(model)
    penalty.refresh()
    (param, buffer), _ = penalty.gradients()
    assert not param.is_contiguous()
    assert buffer.stride() == param.stride()
    delta = param.detach() - penalty.anchor["0.weight"]
    expected = dense_part(delta, bases["0.weight"], "input", "inside")
    torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("side", "protect", "kind"), CASES)
def test_projection_removes_the_penalised_part_and_nothing_else(side, protect, kind, dtype):
    model = conv_model(dtype)
    bases = random_bases(model, side, kind)
    penalty = SubspacePenalty(model, bases, side=side, protect=protect)
    move(model)
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    penalty.project_()
    for name, p in model.named_parameters():
        if name in bases:
            delta = before[name] - penalty.anchor[name].double()
            expected = before[name] - dense_part(delta, bases[name], side, protect)
        else:
            expected = before[name]
        # bfloat16: one rounding of the result, and the subtraction's cancellation.
        tolerance = 1e-12 if dtype == torch.float64 else 1e-2
        torch.testing.assert_close(p.double(), expected, rtol=tolerance, atol=tolerance * 0.1)
    if dtype == torch.float64:
        assert penalty.value().item() < 1e-24


def test_anchor_and_bases_are_copies():
    model = conv_model()
    bases = random_bases(model, "input", "dense")
    kept = {name: u.clone() for name, u in bases.items()}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty = SubspacePenalty(model, bases)
    move(model)
    for u in bases.values():
        u.zero_()
    for name, u in kept.items():
        assert torch.equal(penalty.bases[name], u)
        assert torch.equal(penalty.anchor[name], start[name])


GOOD = torch.eye(20)[:, :2]


@pytest.mark.parametrize(
    ("bases", "error", "match"),
    [
        ([GOOD], TypeError, "bases must be a mapping .*got list"),
        ({}, ValueError, "bases is empty"),
        ({"3.weight": GOOD}, ValueError, "bases names '3.weight', which is not a parameter"),
        ({"2.bias": torch.eye(6)}, ValueError, r"shape \(6,\), which has no sides"),
        ({"2.weight": None}, TypeError, "'2.weight' must be a tensor, got NoneType"),
        ({"2.weight": GOOD.int()}, TypeError, "floating point, or int64 indices, got torch.int32"),
        ({"2.weight": GOOD.T}, ValueError, r"shape \(2, 20\), expected \(20, k\)"),
        ({"2.weight": GOOD[:, :0]}, ValueError, r"\(20, 0\), expected \(20, k\)"),
        ({"2.weight": GOOD * 1.001}, ValueError, "not orthonormal: .* off the identity by 0.002"),
        ({"2.weight": GOOD.roll(1, 1) + GOOD}, ValueError, "not orthonormal"),
        ({"2.weight": GOOD * math.nan}, ValueError, "not orthonormal"),
        ({"2.weight": torch.tensor([[0]])}, ValueError, r"of shape \(k,\), got \(1, 1\)"),
        ({"2.weight": torch.tensor([], dtype=torch.int64)}, ValueError, r"got \(0,\)"),
        ({"2.weight": torch.tensor([0, 20])}, ValueError, r"outside \[0, 20\)"),
        ({"2.weight": torch.tensor([-1])}, ValueError, r"outside \[0, 20\)"),
        ({"2.weight": torch.tensor([1, 2, 1])}, ValueError, "an index twice"),
    ],
)
def test_refuses_wrong_bases(bases, error, match):
    with pytest.raises(error, match=match):
        SubspacePenalty(conv_model(torch.float32), bases)


def test_refuses_wrong_options():
    model = conv_model(torch.float32)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        SubspacePenalty([], {"2.weight": GOOD})
    with pytest.raises(ValueError, match=r"unknown side 'left'; choose one of \['output', 'inp"):
        SubspacePenalty(model, {"2.weight": GOOD}, side="left")
    with pytest.raises(ValueError, match=r"unknown protect None; choose one of \['inside'"):
        SubspacePenalty(model, {"2.weight": GOOD}, protect=None)
    with pytest.raises(ValueError, match="strength must be finite"):
        SubspacePenalty(model, {"2.weight": GOOD}, -1.0)


def test_state_round_trip_with_another_rank(tmp_path):
    model = conv_model()
    saved = SubspacePenalty(model, random_bases(model, "input", "dense", k=4), 3.0)
    torch.save(saved.state_dict(), tmp_path / "subspace.pt")
    move(model)
    loaded = SubspacePenalty(model, random_bases(model, "input", "dense", k=2, seed=9))
    addresses = [t.data_ptr() for pair in loaded.gradients() for t in pair]
    loaded.load_state_dict(torch.load(tmp_path / "subspace.pt", weights_only=True))
    assert loaded.strength == 3.0
    assert loaded.value().item() == saved.value().item() > 0
    assert loaded.refresh().item() == saved.refresh().item()
    for (_, ours), (_, theirs) in zip(loaded.gradients(), saved.gradients(), strict=True):
        assert torch.equal(ours, theirs)
    assert [t.data_ptr() for pair in loaded.gradients() for t in pair] == addresses


def test_consolidate_protects_other_bases_around_the_model_as_it_is():
    model = conv_model()
    penalty = SubspacePenalty(model, random_bases(model, "input", "dense"), 3.0)
    addresses = [t.data_ptr() for pair in penalty.gradients() for t in pair]
    move(model)
    bases = random_bases(model, "input", "dense", k=3, seed=5)
    fresh = SubspacePenalty(model, bases, 3.0)
    value = penalty.value().item()
    for broken, match in [
        ({"2.weight": bases["2.weight"]}, r"bases lacks '0\.weight', which this penalty holds"),
        (bases | {"2.bias": bases["2.weight"]}, r"basis of '2\.bias' is .* no sides"),
        (bases | {"2.weight": bases["2.weight"] * 2}, r"basis of '2\.weight' is not orthonormal"),
    ]:
        with pytest.raises(ValueError, match=match):
            penalty.consolidate(broken)
        assert penalty.value().item() == value > 0
    penalty.consolidate(bases)
    assert penalty.value().item() == 0.0
    move(model, seed=7)
    assert penalty.refresh().item() == fresh.refresh().item() > 0
    assert penalty.value().item() == fresh.value().item()
    assert [t.data_ptr() for pair in penalty.gradients() for t in pair] == addresses


def test_refuses_a_state_that_does_not_fit_before_changing_anything():
    model = conv_model()
    penalty = SubspacePenalty(model, random_bases(model, "input", "dense"), 3.0)
    good = penalty.state_dict()
    move(model)
    value = penalty.value().item()
    for breakage, error, match in [
        ({"side": "output"}, ValueError, "side='output', this penalty 'input'; build it with"),
        ({"strength": math.inf}, ValueError, "strength must be finite"),
        ({"anchor": {}}, ValueError, "anchor lacks '0.weight'"),
        ({"bases": good["bases"] | {"x": GOOD}}, ValueError, "bases has 'x'"),
        ({"bases": good["bases"] | {"2.weight": GOOD.double() * 2}}, ValueError, "not orthonormal"),
        ({"anchor": good["anchor"] | {"2.weight": GOOD}}, ValueError, r"has shape \(20, 2\)"),
        ({"extra": 1}, ValueError, "a SubspacePenalty state is a mapping with keys .*'extra'"),
        ({"bases": None}, TypeError, "bases must be a mapping"),
    ]:
        with pytest.raises(error, match=match):
            penalty.load_state_dict({**good, "strength": 9.0, **breakage})
        assert penalty.value().item() == value
