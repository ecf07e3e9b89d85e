"""Kronecker factors of attention and experts, against the definition written out by hand.

By hand every sample runs by itself through plain products; what these read, and the gradients of
what they return, are kept and averaged as KFAC has it.
"""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from fisher_models import randomised
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from ars import ARSAdamW
from ars.regularizers import (
    ActivationCovariance,
    KroneckerFisher,
    KroneckerPenalty,
    SubspacePenalty,
    load_penalty,
    save_penalty,
)

WIDTH, CLASSES, LENGTH = 4, 3, 5


class Attention(nn.Module):
    """Attention of a sequence to itself, or to other tensors that are made of it."""

    def __init__(self, kind: str, *, batch_first: bool = True, weights: bool = False) -> None:
        super().__init__()
        self.kind, self.batch_first, self.weights = kind, batch_first, weights
        other = {"kdim": 6, "vdim": 2} if kind == "separate" else {}
        self.attention = nn.MultiheadAttention(
            WIDTH, 2, batch_first=batch_first, bias=kind != "without bias", **other
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "cross":
            memory = x[:, :3].sin()
            return x, memory, memory
        if self.kind == "separate":
            return x, torch.cat((x, x[..., :2]), -1), x[..., :2]
        return x, x, x

    def forward(self, x: Tensor) -> Tensor:
        given = self.read(x)
        if given[0] is given[1] and not self.batch_first:
            given = (x.transpose(0, 1),) * 3
        elif not self.batch_first:
            given = tuple(each.transpose(0, 1) for each in given)
        y = self.attention(*given, need_weights=self.weights)[0]
        return self.head(y if self.batch_first else y.transpose(0, 1))


class Experts(nn.Module):
    """Two of four experts for every token, as transformers stores them."""

    has_gate = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(4, 6, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(4, WIDTH, 3))
        self.factor = 1.0

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return functional.silu(gate) * up

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up = torch.einsum("epd,td->tep", self.gate_up_proj, x)
        every = torch.einsum("edp,tep->ted", self.down_proj, self._apply_gate(up))
        chosen = every.gather(1, index[..., None].expand(*index.shape, WIDTH))
        return self.factor * (weights[..., None] * chosen).sum(1)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), Experts()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, index = self.router(tokens).softmax(-1).topk(2)
        return self.head((tokens + self.experts(tokens, index, weights)).view_as(x))


class Tape:
    """Products by hand: what they read, and what they return."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int | None, Tensor, Tensor, Tensor | None]] = []

    def __call__(
        self,
        name: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        block: int | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        y = x @ weight.mT if bias is None else x @ weight.mT + bias
        self.made.append((name, block, x.detach(), y, at))
        return y


def attention_by_hand(model: Attention, x: Tensor, tape: Tape) -> Tensor:
    own, (query, key, value) = model.attention, model.read(x[None])
    q_bias, k_bias, v_bias = 3 * (None,) if own.in_proj_bias is None else own.in_proj_bias.chunk(3)
    if model.kind == "separate":
        q = tape("attention.q_proj_weight", query[0], own.q_proj_weight) + q_bias
        k = tape("attention.k_proj_weight", key[0], own.k_proj_weight) + k_bias
        v = tape("attention.v_proj_weight", value[0], own.v_proj_weight) + v_bias
    elif model.kind == "cross":
        q, k, v = (
            tape("attention.in_proj_weight", each[0], w, b, block)
            for block, (each, w, b) in enumerate(
                zip(
                    (query, key, value),
                    own.in_proj_weight.chunk(3),
                    (q_bias, k_bias, v_bias),
                    strict=True,
                )
            )
        )
    else:
        both = tape("attention.in_proj_weight", query[0], own.in_proj_weight, own.in_proj_bias)
        q, k, v = both.chunk(3, -1)
    heads = [
        (qh @ kh.mT / math.sqrt(WIDTH // 2)).softmax(-1) @ vh
        for qh, kh, vh in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True)
    ]
    y = tape("attention.out_proj.weight", torch.cat(heads, -1), own.out_proj.weight,
             own.out_proj.bias)  # fmt: skip
    return tape("head.weight", y, model.head.weight, model.head.bias)


def mixture_by_hand(model: Mixture, x: Tensor, tape: Tape) -> Tensor:
    own = model.experts
    weights, index = tape(
        "router.weight", x, model.router.weight, model.router.bias
    ).softmax(-1).topk(2)  # fmt: skip
    total = x
    for e in range(4):
        at = torch.tensor([t for t in range(len(x)) if e in index[t]], dtype=torch.int64)
        share = [weights[t, index[t].tolist().index(e)] for t in at.tolist()]
        both = tape("experts.gate_up_proj", x[at], own.gate_up_proj[e], None, e, at)
        gate, up = both.split(3, -1)
        hidden = gate * gate.sigmoid() * up
        y = tape("experts.down_proj", hidden, own.down_proj[e], None, e, at)
        for i, t in enumerate(at.tolist()):
            total = total + functional.one_hot(torch.tensor(t), len(x))[:, None] * y[i] * share[i]
    return tape("head.weight", total, model.head.weight, model.head.bias)


def factors_by_hand(model, by_hand, x, y, sharing):
    """A and G by name and number of the matrix, sample by sample."""
    biased = {"head.weight", "router.weight"}
    if getattr(model, "kind", "without bias") not in {"without bias", "separate"}:
        biased.add("attention.in_proj_weight")
    if getattr(model, "kind", "without bias") != "without bias":
        biased.add("attention.out_proj.weight")
    reads: dict[tuple[str, int | None], list[Tensor]] = {}
    sends: dict[tuple[str, int | None], list[Tensor]] = {}
    for sample, targets in zip(x, y, strict=True):
        tape = Tape()
        logits = by_hand(model, sample, tape)
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        outputs = [made[3] for made in tape.made]
        found = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
        for (name, block, rows, _, at), g in zip(tape.made, found, strict=True):
            if name in biased:
                rows = torch.cat((rows, torch.ones_like(rows[:, :1])), 1)
            counts = targets != -100
            if at is not None:
                counts = counts[at]
            elif len(rows) != len(targets):  # of a memory of another length
                counts = counts.any().expand(len(rows))
            rows = rows[counts]
            if sharing == "reduce":
                rows, g = rows.mean(0, keepdim=True) if len(rows) else rows, g.sum(0, keepdim=True)
            reads.setdefault((name, block), []).append(rows)
            sends.setdefault((name, block), []).append(g)
    found = {}
    for key, rows in reads.items():
        a, g = torch.cat(rows), torch.cat(sends[key])
        found[key] = a.T @ a / max(1, len(a)), g.T @ g / len(x)
    result = {}
    for name in dict.fromkeys(name for name, _ in found):
        if (name, None) in found:
            result[name] = found[name, None]
        else:
            of = [found[name, b] for b in sorted(b for n, b in found if n == name)]
            result[name] = tuple(torch.stack(each) for each in zip(*of, strict=True))
    return result


MODELS = {
    "self": (lambda: Attention("self"), attention_by_hand),
    "self, positions first": (lambda: Attention("self", batch_first=False), attention_by_hand),
    "self, with weights": (lambda: Attention("self", weights=True), attention_by_hand),
    "without bias": (lambda: Attention("without bias"), attention_by_hand),
    "cross": (lambda: Attention("cross"), attention_by_hand),
    "cross, positions first": (lambda: Attention("cross", batch_first=False), attention_by_hand),
    "separate": (lambda: Attention("separate"), attention_by_hand),
    "experts": (Mixture, mixture_by_hand),
}


def build(name):
    make, by_hand = MODELS[name]
    return randomised(make()), by_hand


def data(n=6, masked=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, LENGTH, WIDTH, dtype=torch.float64, generator=generator)
    y = torch.randint(CLASSES, (n, LENGTH), generator=generator)
    if masked:
        y[1, 2:] = y[3] = -100
    return x, y


def quietly(fit, *args):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nothing is known of attention.in_proj_bias: ")
        return fit(*args)


def fitted(model, batches, **options):
    return quietly(KroneckerFisher(model, "empirical", **options).fit, batches)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_factors_are_those_by_hand(name, masked, sharing):
    (model, by_hand), (x, y) = build(name), data(masked=masked)
    expected = factors_by_hand(model, by_hand, x, y, sharing)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    factors = fitted(model.train(), batches, sharing=sharing).factors
    assert factors.keys() == expected.keys()
    for weight, pair in expected.items():
        torch.testing.assert_close(tuple(factors[weight]), pair, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_covariances_are_those_by_hand(name):
    (model, by_hand), (x, y) = build(name), data()
    expected = factors_by_hand(model, by_hand, x, y, "expand")
    activations = ActivationCovariance(model)
    quietly(activations.fit, [(x[:4], y[:4]), (x[4:], y[4:])])
    halves = [ActivationCovariance(model), ActivationCovariance(model)]
    for half, part in zip(halves, (slice(4), slice(4, None)), strict=True):
        quietly(half.fit, [(x[part], y[part])])
    merged = halves[0].merge(halves[1]).covariance
    for weight, (a, _) in expected.items():
        found = activations.covariance[weight]
        torch.testing.assert_close(found, a[..., : found.shape[-1], : found.shape[-1]])
        torch.testing.assert_close(found, merged[weight])


def test_torchs_own_layer_in_evaluation_mode_takes_no_fused_path():
    model = nn.Sequential(
        nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True), nn.Linear(WIDTH, CLASSES)
    )
    model, (x, y) = randomised(model).eval(), data()
    with torch.no_grad():
        before = model(x)
    with pytest.warns(UserWarning, match=r"nothing is known of 0\.norm1\.weight"):
        factors = KroneckerFisher(model, "empirical").fit([(x, y)]).factors
    inner = ["0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight"]
    assert list(factors) == [*inner, "0.linear1.weight", "0.linear2.weight", "1.weight"]
    assert factors[inner[0]].outputs.shape == (12, 12)
    assert all(factors[name].outputs.any() for name in inner)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)


def as_matrix(model, name, a, change):
    """[W b] of each matrix of a weight, of the changes of parameters by name."""
    matrix = change[name].reshape(*a.shape[:-2], -1, change[name].shape[-1])
    if a.shape[-1] > matrix.shape[-1]:
        bias = change[name.removesuffix("weight") + "bias"]
        matrix = torch.cat((matrix, bias.reshape(*matrix.shape[:-1], 1)), -1)
    return matrix


@pytest.mark.parametrize("measure", ["fisher", "activations"])
@pytest.mark.parametrize("name", ["self", "cross", "experts"])
def test_the_penalty_and_its_pull_are_the_closed_form(name, measure, tmp_path):
    (model, _), (x, y) = build(name), data()
    source = fitted(model, [(x, y)])
    if measure == "activations":
        source = ActivationCovariance(model).fit([(x, y)])
    penalty = KroneckerPenalty(model, source, strength=3.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved(model)
    parameters = dict(penalty.named_parameters())
    assert parameters.keys() == before.keys()
    change = {n: (p.detach() - before[n]).requires_grad_() for n, p in parameters.items()}
    expected = 0.0
    for weight, (a, g) in penalty.factors.items():
        delta = as_matrix(model, weight, a, change)
        g = torch.eye(delta.shape[-2], dtype=a.dtype) if g is None else g
        for d, one_a, one_g in zip(*(t.reshape(-1, *t.shape[-2:]) for t in (delta, a, g.expand(
            *a.shape[:-2], *g.shape[-2:]))), strict=True):  # fmt: skip
            expected = expected + 1.5 * torch.trace(one_g @ d @ one_a @ d.T)
    gradients = torch.autograd.grad(expected, list(change.values()))
    torch.testing.assert_close(penalty.value(), expected)
    torch.testing.assert_close(penalty.refresh(), expected.detach())
    pulls = {id(p): buffer for p, buffer in penalty.gradients()}
    for p, gradient in zip(parameters.values(), gradients, strict=True):
        torch.testing.assert_close(pulls[id(p)], gradient)
    for n, anchor in penalty.anchor.items():
        torch.testing.assert_close(anchor, before[n])
    save_penalty(penalty, tmp_path / "penalty")
    again = KroneckerPenalty(model, source)
    load_penalty(again, tmp_path / "penalty")
    assert again.value() == penalty.value()
    opt = ARSAdamW(model.parameters(), lr=0.01, ars=None, weight_decay=0.0, penalty=penalty)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert penalty.value() < expected


@pytest.mark.parametrize("name", ["cross", "experts"])
def test_tasks_are_merged_matrix_by_matrix(name):
    (model, _), (x, y) = build(name), data(8)
    first, second = fitted(model, [(x[:4], y[:4])]), fitted(model, [(x[4:], y[4:])])
    penalty = KroneckerPenalty(model, first)
    penalty.consolidate(second, decay=0.5)
    name = max(first.factors, key=lambda n: first.factors[n].inputs.ndim)
    for i, (a, g) in enumerate(zip(*penalty.factors[name], strict=True)):
        (a1, g1), (a2, g2) = ((f.factors[name].inputs[i], f.factors[name].outputs[i])
                              for f in (first, second))  # fmt: skip
        expected = nearest(0.5, a1, g1, a2, g2)
        torch.testing.assert_close(torch.kron(g, a), expected, rtol=1e-6, atol=1e-12)


def nearest(decay, a1, g1, a2, g2):
    """The Kronecker product nearest to a sum of two, by a decomposition of the rearranged sum."""
    total = decay * torch.outer(g1.flatten(), a1.flatten()) + torch.outer(
        g2.flatten(), a2.flatten()
    )
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    return torch.kron(u[:, 0].view_as(g1), s[0] * v[0].view_as(a1))


def test_what_only_looks_like_experts_is_named_and_left_out():
    (model, _), (x, y) = build("experts"), data()
    model.experts.factor = 2.0
    with pytest.warns(UserWarning, match=r"of experts\.gate_up_proj, experts\.down_proj: protect"):
        factors = KroneckerFisher(model, "empirical").fit([(x, y)]).factors
    assert list(factors) == ["router.weight", "head.weight"]


class Both(Attention):
    """Of a sequence to itself, and then to another tensor, by the same matrix."""

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x)
        return self.head(self.attention(y, x, x)[0])


@pytest.mark.parametrize("kind", [KroneckerFisher, ActivationCovariance])
def test_a_matrix_that_is_one_and_three_is_refused(kind):
    model, (x, y) = randomised(Both("both")), data(masked=False)
    with pytest.raises(ValueError, match=r"uses 'attention\.in_proj_weight' on one tensor .* and"):
        kind(model).fit([(x[:2], y[:2]), (x[2:], y[2:])])


def test_several_matrices_have_no_subspace_in_common():
    (model, _), (x, _) = build("experts"), data()
    activations = ActivationCovariance(model).fit([x])
    with pytest.warns(UserWarning, match=r"'experts\.gate_up_proj', .*holds several matrices"):
        penalty = SubspacePenalty.from_activations(model, activations, rank=1)
    assert [n for n, _ in penalty.named_parameters()] == ["router.weight", "head.weight"]
    with pytest.raises(ValueError, match=r"'experts\.down_proj' holds several matrices"):
        SubspacePenalty.from_activations(model, activations, rank=1, names=["experts.down_proj"])


def test_factors_of_other_sizes_are_refused():
    model, eye = build("experts")[0], torch.eye(WIDTH, dtype=torch.float64)
    for name, a, says in (
        ("experts.gate_up_proj", eye.expand(3, -1, -1), r"is of 3 matrices, which a weight of sh"),
        ("experts.gate_up_proj", eye[:3, :3].expand(4, -1, -1), r"expected \(4, 4, 4\)"),
        ("experts.gate_up_proj", eye, r"expected \(24, 24\)"),
        ("head.weight", eye.expand(2, -1, -1), r"is of 2 matrices, which a weight of shape \(3, 4"),
        ("head.weight", eye[:0].view(0, 4, 4), r"is of 0 matrices"),
        ("experts.down_proj", -eye[:3, :3].expand(4, -1, -1), r"negative diagonal"),
    ):
        with pytest.raises(ValueError, match=says):
            KroneckerPenalty(model, {name: (a, None)})


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["self", "experts"])
def test_sharded_models_are_measured_whole_and_several_matrices_not_pulled(name, group):
    (model, _), (x, y) = build(name), data()
    expected = fitted(model, [(x, y)]).factors
    found = fitted(fully_shard(model), [(x, y)])
    for weight, pair in expected.items():
        torch.testing.assert_close(tuple(found.factors[weight]), tuple(pair))
    if name == "self":
        assert KroneckerPenalty(model, found).value() == 0.0
    else:
        with pytest.raises(
            ValueError, match=r"gate_up_proj' holds several matrices and is sharded"
        ):
            KroneckerPenalty(model, found)
