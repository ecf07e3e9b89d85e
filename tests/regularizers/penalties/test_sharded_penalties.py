"""Penalties of parameters that are divided among processes: those of one process on the whole."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    AdaptiveStrength,
    KroneckerPenalty,
    ProgressiveInheritance,
    SubspacePenalty,
    trace_strengths,
)
from ranks import run_ranks, whole

RANKS = 2
STEPS = 4
EWC_KINDS = {
    "full": {},
    "proximal": {"mode": "proximal"},
    "bfloat16": {"storage": "bfloat16"},
    "layers": {"layer_strengths": {"0.weight": 2.0}},
}
SUBSPACES = [(side, protect) for side in ("input", "output") for protect in ("inside", "outside")]
KINDS = [
    *EWC_KINDS, "compact", "kronecker", "activations",
    *(f"{kind} {side} {what}" for kind in ("basis", "coordinates") for side, what in SUBSPACES),
    "progressive",
]  # fmt: skip
PLACES = ("fully_shard", "columns", "mesh")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1))


def importance(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def factors(model, seed, *, outputs):
    found = {}
    for index in (0, 2, 3):
        rows, columns = model[index].weight.shape
        generator = torch.Generator().manual_seed(seed + index)
        a = torch.randn(9, columns + 1, generator=generator)
        g = torch.randn(9, rows, generator=generator)
        found[f"{index}.weight"] = a.T @ a / 9, g.T @ g / 9 if outputs else None
    return found


def basis(model, side, seed=3):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in ("0.weight", "2.weight"):
        size = dict(model.named_parameters())[name].shape[side == "input"]
        found[name] = torch.linalg.qr(torch.randn(size, 2, generator=generator))[0]
    return found


def build(kind, model):
    """Build a penalty of a model from whole tensors."""
    if kind in EWC_KINDS:
        return EWC(model, importance(model), 3.0, **EWC_KINDS[kind])
    if kind == "compact":
        return EWC(model, importance(model), 3.0, storage="compact")
    if kind in ("kronecker", "activations"):
        return KroneckerPenalty(model, factors(model, 5, outputs=kind == "kronecker"), 2.0)
    if kind == "progressive":
        subspace = SubspacePenalty(model, basis(model, "input"), 2.0)
        return ProgressiveInheritance(EWC(model, importance(model), 3.0), subspace)
    what, side, protect = kind.split()
    if what == "basis":
        return SubspacePenalty(model, basis(model, side), 2.0, side=side, protect=protect)
    coordinates = {"0.weight": 2, "2.weight": torch.tensor([0, 2])}
    return SubspacePenalty.from_coordinates(model, coordinates, 2.0, side=side, protect=protect)


def divide(model, place):
    """Divide a model's parameters among the processes."""
    if place == "fully_shard":
        for layer in (model[0], model[2], model):
            fully_shard(layer)
        return model
    mesh = init_device_mesh("cpu", (RANKS, 1) if place == "mesh" else (RANKS,))
    for module in model:
        for name, param in list(module.named_parameters()):
            how = [Shard(param.ndim - 1)] + [Replicate()] * (place == "mesh")
            placed = distribute_tensor(param.detach().clone(), mesh, how, src_data_rank=None)
            setattr(module, name, nn.Parameter(placed))
    return model


def move(model, seed):
    """Move a model's parameters by numbers of one seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            change = 0.1 * torch.randn(param.shape, generator=generator)
            if isinstance(param, DTensor):
                change = distribute_tensor(
                    change, param.device_mesh, param.placements, src_data_rank=None
                )
            param.add_(change)


def run(kind, place, when):
    """Return values, gradients and weights: of steps with the penalty, and of the penalty alone."""
    model = network()
    penalty = build(kind, model) if when == "before" else None
    if place is not None:
        divide(model, place)
    if penalty is None:
        penalty = build(kind, model)
    optimizer = ARSAdamW(model.parameters(), lr=0.05, penalty=penalty, max_grad_norm=0.5)
    move(model, 7)
    values, results = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            gradient = torch.randn(param.shape, generator=generator)
            if isinstance(param, DTensor):
                gradient = distribute_tensor(
                    gradient, param.device_mesh, param.placements, src_data_rank=None
                )
            param.grad = gradient
        alone = float(penalty.value().detach())
        optimizer.step(loss=1.0)
        values += [alone, float(optimizer.diagnostics["penalty"])]
    optimizer.zero_grad()
    value = 2 * penalty.value()
    value.backward()
    grads = [torch.zeros(p.shape) if p.grad is None else whole(p.grad) for p in model.parameters()]
    if hasattr(penalty, "project_"):
        penalty.project_()
    results = [whole(p) for p in model.parameters()]
    if kind in ("full", "compact", "bfloat16"):
        move(model, 8)
        penalty.add_task(importance(model, 2))
        values.append(penalty.constant)
        move(model, 9)
        penalty.consolidate(importance(model, 4), decay=0.5)
        results += [whole(t) for t in (*penalty.anchor.values(), *penalty.importance.values())]
    if kind in ("kronecker", "activations"):
        move(model, 8)
        penalty.consolidate(factors(model, 11, outputs=kind == "kronecker"), decay=0.5)
        results += [whole(t) for t in penalty.anchor.values()]
        values.append(float(penalty.value().detach()))
    return values, grads, results, type(value.detach()).__name__


def loaded(kind):
    """Return what a penalty is after it has loaded the whole state of one process."""
    model = network()
    state = copy.deepcopy(build(kind, model).state_dict())
    other = divide(network(seed=1), "fully_shard")
    penalty = build(kind, other)
    penalty.load_state_dict(state)
    again = build(kind, other)
    again.load_state_dict(penalty.state_dict())
    move(other, 7)
    return float(penalty.value().detach()), float(again.value().detach())


def adapted(place):
    """Follow the ratio of two gradients, each of the whole model."""
    strengths = []
    for kind in ("full", "compact", "progressive"):
        model = network()
        if place is not None:
            divide(model, place)
        penalty = build(kind, model)
        adaptive = AdaptiveStrength(getattr(penalty, "ewc", penalty), ratio=0.5, smoothing=0.5)
        move(model, 7)
        for param in model.parameters():
            param.grad = torch.full_like(param, 0.1)
        adaptive.step()
        strengths.append(float(adaptive.strength))
    fisher = {name: param.detach() ** 2 for name, param in model.named_parameters()}
    return strengths, trace_strengths(fisher)


def the_issue():
    """A 4 x 4 weight moved by 1 from its anchor, importance 1, strength 2: 16."""
    model = nn.Linear(4, 4, bias=False)
    fully_shard(model)
    penalty = EWC(model, {"weight": torch.ones(4, 4)}, strength=2.0)
    optimizer = ARSAdamW(model.parameters(), penalty=penalty)
    with torch.no_grad():
        model.weight.add_(1.0)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step(loss=1.0)
    return float(optimizer.diagnostics["penalty"])


def refusals():
    messages = []
    columns = divide(network(), "columns")
    sharded = divide(network(), "fully_shard")
    bad = importance(sharded)
    bad["0.weight"] = distribute_tensor(
        torch.full((5, 4), 1.0), sharded[0].weight.device_mesh, [Shard(0)]
    )
    if bad["0.weight"].device_mesh.get_rank() == 1:  # one process sees it, and all say so
        bad["0.weight"].to_local()[0, 0] = -1.0
    for wrong in (
        lambda: build("kronecker", columns),
        lambda: EWC(sharded, bad),
        lambda: build("full", sharded).grown(network()),
    ):
        try:
            wrong()
        except ValueError as error:
            messages.append(str(error))
    return messages


def in_a_loss(rank):
    """Train on the penalty's value in the loss, under FSDP2, on data of the rank's own."""
    found = []
    for place in (None, "fully_shard"):
        model = network()
        penalty = build("progressive", model)
        if place is not None:
            divide(model, place)
        move(model, 7)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(3):
            data = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
            data = data if place is None else data.chunk(RANKS)[rank]
            optimizer.zero_grad()
            (model(data).square().mean() + penalty.value()).backward()
            optimizer.step()
        found.append([whole(p) for p in model.parameters()])
    return found


def work(rank):
    results = {}
    for kind in KINDS:
        for place in PLACES:
            if place != "fully_shard" and kind in ("kronecker", "activations"):
                continue
            for when in ("before", "after"):
                results[kind, place, when] = run(kind, place, when)
    results["loaded"] = {kind: loaded(kind) for kind in KINDS}
    results["adapted"] = adapted("fully_shard")
    results["issue"] = the_issue()
    results["refusals"] = refusals()
    results["loss"] = in_a_loss(rank)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(work, RANKS, tmp_path_factory.mktemp("penalties"))


# Weights that are divided by columns have no Kronecker penalty.
DIVIDED = [
    (kind, place)
    for kind in KINDS
    for place in PLACES
    if place == "fully_shard" or kind not in {"kronecker", "activations"}
]


@pytest.mark.parametrize(("kind", "place"), DIVIDED)
def test_a_penalty_of_parts_is_that_of_the_whole(results, kind, place):
    values, grads, weights, _ = run(kind, None, "after")
    # Blocks of 64 that share a scale are others in a part.
    tolerance = {"rtol": 0.02, "atol": 0.02} if kind == "compact" else {"rtol": 1e-5, "atol": 2e-6}
    for when in ("before", "after"):
        first, second = (result[kind, place, when] for result in results)
        assert first[0] == second[0]
        assert first[3] == "Tensor"  # it is added to a loss that is no DTensor
        assert first[0] == pytest.approx(values, rel=0.02 if kind == "compact" else 2e-6)
        for mine, theirs in zip(first[1] + first[2], grads + weights, strict=True):
            torch.testing.assert_close(mine.to(theirs.dtype), theirs, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_states_are_loaded(results, kind):
    model = network()
    penalty = build(kind, model)
    other = network(seed=1)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    move(model, 7)
    expected = float(penalty.value().detach())
    for result in results:
        for found in result["loaded"][kind]:
            assert found == pytest.approx(expected, rel=0.02 if kind == "compact" else 2e-6)


def test_the_value_is_that_of_the_whole(results):
    assert [result["issue"] for result in results] == [16.0] * RANKS


def test_strengths_follow_the_whole_model(results):
    strengths, traces = adapted(None)
    for result in results:
        assert result["adapted"][0] == pytest.approx(strengths, rel=1e-2)
        assert result["adapted"][1] == pytest.approx(traces, rel=1e-5)
    assert results[0]["adapted"] == results[1]["adapted"]


def test_what_cannot_be_had_is_refused_by_all(results):
    for result in results:
        kronecker, negative, grown = result["refusals"]
        assert "'0.weight' is sharded by columns" in kronecker
        assert "the importance of '0.weight' holds a negative value" in negative
        assert "grow the model and its penalty before they are sharded" in grown


def test_a_value_may_be_in_a_loss(results):
    for result in results:
        for mine, theirs in zip(*result["loss"], strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-6)
