"""Faults as they are called, from half-way on, and the arms that go through them."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ars.models import GPT
from common.program import StopRequest
from corpus import Corpus
from stress import faults, stress_run
from stress.compared_optimizers import ARMS, PEER_ARMS, Step, arm_named, arm_settings
from stress.faults import FAULTS, Fault, PlainAttention, fault_settings
from stress.networks import NETWORKS
from stress.scenarios import SCENARIOS, Size, Stream, load_file
from stress.stress_run import Job, identity_of, run_job

SIZE = Size(layers=1, width=32, sequence_len=24, batch_size=4, steps=40)
HALF = 20


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(text: Path) -> Corpus:
    return load_file(text, SIZE.sequence_len)


def run(corpus: Corpus, scenario: str, arm: str, size: Size = SIZE, **changes: Any) -> Any:
    job = Job(scenario, arm, 1.0, 0, size, tuple(changes.items()))
    return run_job(job, StopRequest(), corpus)


# ------------------------------------------------------------------------------- published runs


def test_runs_that_are_published_keep_their_identity(corpus: Corpus) -> None:
    """Committed figures are known by these settings: what is new must not be among them."""
    shared = {"base_rates", "weight_decay", "momentum"}
    for arm in ARMS:
        settings = arm_settings(arm, {})
        assert settings.keys() == shared | {"family", "controller", "clip", "factor", "betas"}
    for scenario in SCENARIOS:
        identity = identity_of(Job(scenario, "default", 1.0, 0, SIZE), corpus)
        assert identity.keys() == {
            "scenario", "arm", "rate", "seed", "size", "changes", "corpus", "update", "stress",
            "measurement", "torch",
        }  # fmt: skip
    assert not FAULTS.keys() & SCENARIOS.keys()
    assert not PEER_ARMS.keys() & ARMS.keys()


# ------------------------------------------------------------------------------- data


def batches(corpus: Corpus, scenario: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stream = Stream(scenario, 0, SIZE, corpus.train)
    model = GPT(SIZE.model(), torch.Generator().manual_seed(0))
    return [stream.training(step, model) for step in range(SIZE.steps)]


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("scenario", FAULTS)
def test_batches_are_spoiled_when_it_is_said(corpus: Corpus, scenario: str) -> None:
    plain, spoiled = batches(corpus, "ordinary"), batches(corpus, scenario)
    fault = FAULTS[scenario]
    lasts = (fault.steps or SIZE.steps) if fault.data else 0
    changed = [not same(a, b) for a, b in zip(plain, spoiled, strict=True)]
    assert changed == [HALF <= step < HALF + lasts for step in range(SIZE.steps)]
    assert all(same(a, b) for a, b in zip(spoiled, batches(corpus, scenario), strict=True))


def test_shards_are_corrupted_as_they_are_called(corpus: Corpus) -> None:
    inputs, targets = batches(corpus, "ordinary")[HALF]
    random = batches(corpus, "random-1")[HALF]
    assert random[0].shape == inputs.shape
    assert torch.equal(random[0][:, 1:], random[1][:, :-1])
    assert len(random[0].unique()) > 0.25 * random[0].numel()  # the text has 27 byte values
    repeated = batches(corpus, "repeated-5")[HALF]
    assert len(torch.cat(repeated).unique()) == 1
    swapped = batches(corpus, "swapped-1")[HALF]
    assert torch.equal(swapped[0], inputs)
    assert torch.equal(swapped[1], targets[[3, 0, 1, 2]])
    short = batches(corpus, "short")[HALF]
    assert torch.equal(short[0], inputs[:, :6])
    assert torch.equal(short[1], targets[:, :6])


def test_a_fifth_of_the_labels_is_noise(corpus: Corpus) -> None:
    plain, noisy = batches(corpus, "ordinary"), batches(corpus, "noisy")
    wrong = [
        (a[1] != b[1]).float().mean().item()
        for a, b in zip(plain[HALF:], noisy[HALF:], strict=True)
    ]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, noisy, strict=True))
    assert sum(wrong) / len(wrong) == pytest.approx(0.2 * 255 / 256, abs=0.03)
    assert len(set(wrong)) > 5  # drawn anew in every step


def test_data_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data must be one of random, .*, got 'noise'"):
        Fault("x", "y", data="noise")


# ------------------------------------------------------------------------------- rates


def test_rates_of_faults(corpus: Corpus) -> None:
    def rates(scenario: str) -> list[float]:
        stream = Stream(scenario, 0, SIZE, corpus.train)
        return [stream.rate(step) for step in range(SIZE.steps)]

    usual = [0.25, 0.5, 0.75] + [1.0] * 37
    assert rates("ordinary") == rates("random-5") == rates("lost-moments") == usual
    assert rates("rate-3") == [*usual[:HALF], *[3.0] * HALF]
    assert rates("rate-10") == rates("entropy") == [*usual[:HALF], *[10.0] * HALF]
    assert rates("no-warmup") == [1.0] * 40


# ------------------------------------------------------------------------------- model


@torch.no_grad()
def entropy(model: GPT, tokens: torch.Tensor) -> float:
    """Mean entropy of the attention of the last position, in nats."""
    seen: list[torch.Tensor] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        seen.append((q[..., -1:, :] @ k.transpose(-1, -2) / math.sqrt(q.size(-1))).softmax(-1))
        return original(q, k, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
        model(tokens)
    (weights,) = seen
    return float(torch.special.entr(weights).sum(-1).mean())


def test_plain_attention_by_hand() -> None:
    model: Any = FAULTS["entropy"].changed(GPT(SIZE.model(), torch.Generator().manual_seed(0)))
    attention: Any = model.blocks[0].attn
    assert isinstance(attention, PlainAttention)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(attention.proj.weight, generator=generator)
    h = torch.randn(2, 5, 32, generator=generator)
    angle = torch.arange(5.0)[:, None] * 0.1 * torch.arange(1.0, 17.0)
    cos, sin = angle.cos(), angle.sin()

    def turned(x: torch.Tensor) -> torch.Tensor:  # one head of 32 channels, pairs i and i + 16
        z = torch.complex(x[..., :16], x[..., 16:]) * torch.complex(cos, sin)
        return torch.cat((z.real, z.imag), -1)

    q, k = turned(h @ attention.q.weight.T), turned(h @ attention.k.weight.T)
    logits = q @ k.transpose(1, 2) / math.sqrt(32)
    logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    y = logits.softmax(-1) @ (h @ attention.v.weight.T) @ attention.proj.weight.T
    assert torch.allclose(attention(h, cos, sin), y, atol=1e-5)


def test_without_the_norm_large_weights_lose_the_entropy_of_the_attention() -> None:
    tokens = torch.arange(24)[None]
    usual, plain = (
        cast(GPT, fault.changed(GPT(SIZE.model(), torch.Generator().manual_seed(0))))
        for fault in (FAULTS["rate-10"], FAULTS["entropy"])
    )
    for a, b in zip(usual.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    before = [entropy(model, tokens) for model in (usual, plain)]
    for model in (usual, plain):
        attention: Any = model.blocks[0].attn
        with torch.no_grad():
            attention.q.weight.mul_(10)
            attention.k.weight.mul_(10)
    after = [entropy(model, tokens) for model in (usual, plain)]
    assert after[0] == pytest.approx(before[0], rel=1e-3)
    assert after[1] < before[1] / 4


def test_in_bfloat16_weights_are_and_moments_as_each_keeps_them(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Step] = []

    def kept(*rest: Any) -> Step:
        steps.append(Step(*rest))
        return steps[-1]

    monkeypatch.setattr(stress_run, "Step", kept)
    short = replace(SIZE, steps=6)
    for arm in ("adamw", "default", "spam", "stableadamw", "zclip"):
        record = run(corpus, "bf16", arm, short)
        assert record["metrics"]["final"] < 8.1
        for optimizer in steps[-1].optimizers:
            (group,) = optimizer.param_groups
            assert group["eps"] == 1e-16
            assert {weight.dtype for weight in group["params"]} == {torch.bfloat16}
            moments = {optimizer.state[weight]["exp_avg"].dtype for weight in group["params"]}
            assert moments == {torch.float32 if arm == "default" else torch.bfloat16}


def test_a_fault_of_the_attention_needs_one() -> None:
    network = NETWORKS["lstm"].make(SIZE, torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match="'no QK-norm' is a fault of a GPT's attention; ByteLSTM"):
        FAULTS["plain-attention"].changed(network)


# ------------------------------------------------------------------------------- networks

NETWORK_NAMES = ("lstm", "conv")


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_other_networks_are_causal_and_depend_on_their_seed_alone(name: str) -> None:
    def made(seed: int) -> Any:
        return NETWORKS[name].make(SIZE, torch.Generator().manual_seed(seed))

    first, again, other = made(0), made(0), made(1)
    tokens = torch.arange(24)[None]
    assert (first(tokens) == 0).all()  # all bytes are as likely
    for weight, same, different in zip(
        first.parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same)
        assert torch.equal(weight, different) == bool((weight == 0).all())
    with torch.no_grad():
        first.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 12] = 99
    before, after = first(tokens), first(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    reach = (before != after).any(-1)[0, 12:].tolist()
    # A sequence has a state; one convolution of 3 bytes sees no further.
    assert reach == [True] * (12 if name == "lstm" else 3) + [False] * (0 if name == "lstm" else 9)


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_other_networks_learn_and_their_records_are_their_own(corpus: Corpus, name: str) -> None:
    job = Job("lost-moments", "default", 1.0, 0, SIZE, network=name)
    record = run_job(job, StopRequest(), corpus)
    assert record["metrics"]["final"] < 6
    assert run_job(job, StopRequest(), corpus) == record
    assert record["identity"]["network"]["name"] == name
    assert job.file == f"{name}/{replace(job, network='gpt').file}"


def test_a_network_has_a_rate_of_its_own(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Kept(Step):
        def __call__(self, loss: torch.Tensor, factor: float) -> dict[str, float]:
            shown = super().__call__(loss, factor)
            rates.append(self.optimizers[0].param_groups[0]["lr"])
            return shown

    monkeypatch.setattr(stress_run, "Step", Kept)
    for name in NETWORKS:
        run_job(
            Job("ordinary", "adamw", 1.0, 0, replace(SIZE, steps=2), network=name),
            StopRequest(),
            corpus,
        )
    assert rates == pytest.approx([0.01, 0.01, 0.03, 0.03, 0.01, 0.01])


# ------------------------------------------------------------------------------- state


@pytest.mark.parametrize("arm", ["adamw", "zclip", "spam", "default"])
def test_what_the_optimizer_knows_is_lost_half_way(
    corpus: Corpus, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Step] = []

    def kept(*rest: Any) -> Step:
        made.append(Step(*rest))
        return made[-1]

    monkeypatch.setattr(stress_run, "Step", kept)
    whole, lost = (run(corpus, scenario, arm) for scenario in ("ordinary", "lost-moments"))
    assert len(made) == 3
    assert whole["curves"]["loss"][: HALF + 1] == lost["curves"]["loss"][: HALF + 1]
    assert whole["curves"]["loss"][HALF + 1 :] != lost["curves"]["loss"][HALF + 1 :]


# ------------------------------------------------------------------------------- identity


def test_a_record_is_known_by_its_fault(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("noisy", "zclip", 1.0, 0, SIZE)
    before = identity_of(job, corpus)
    assert before["fault"]["noise"] == 0.2
    assert before["update"]["settings"] == {"threshold": 2.5, "alpha": 0.97, "warmup": 25}
    assert identity_of(replace(job, changes=(("alpha", 0.9),)), corpus) != before
    for name, value in (("_NOISE", 0.3), ("_SHORT", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(faults, name, value)
            assert identity_of(job, corpus) != before
    other = replace(job, network="conv")
    known = identity_of(other, corpus)
    assert known != before
    for settings in ({"rate": 2.0}, {"title": "x"}):
        with monkeypatch.context() as patch:
            patch.setitem(NETWORKS, "conv", replace(NETWORKS["conv"], **settings))
            assert (identity_of(other, corpus) != known) == ("rate" in settings)
    changed = replace(FAULTS["noisy"], steps=3)
    monkeypatch.setitem(FAULTS, "noisy", changed)
    assert identity_of(job, corpus) != before
    assert fault_settings("bf16")["eps"] == 1e-16


# ------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("arm", PEER_ARMS)
def test_every_arm_learns_and_repeats_bit_by_bit(corpus: Corpus, arm: str) -> None:
    record = run(corpus, "ordinary", arm)
    assert record["metrics"]["final"] < 6.5
    assert run(corpus, "ordinary", arm) == record


@pytest.mark.parametrize(
    ("arm", "changes"),
    [
        ("adamw-clip", {"clip": 0.3}),
        ("default-max-norm", {"clip": 0.3}),
        ("low-beta2", {}),
        ("zclip", {"threshold": 1.0, "warmup": 5}),
        ("adagc", {}),
        ("spam", {"theta": 4.0}),
        ("stableadamw", {}),
        ("skip", {"sigmas": 1.0, "window": 8}),
    ],
)
def test_every_peer_acts(corpus: Corpus, arm: str, changes: dict[str, float]) -> None:
    plain = run(corpus, "random-5", "adamw")["curves"]["norm"]
    assert run(corpus, "random-5", arm, **changes)["curves"]["norm"] != plain


def test_a_skipped_step_leaves_weights_and_moments(corpus: Corpus) -> None:
    curves = run(corpus, "random-5", "skip", sigmas=3.0, window=8)["curves"]
    assert curves["norm"][HALF + 1] == curves["norm"][HALF]
    assert curves["norm"][HALF] != curves["norm"][HALF - 1]


def test_max_grad_norm_is_clipping_before_the_step(corpus: Corpus) -> None:
    outside, inside, other = (
        run(corpus, "random-5", arm, clip=clip)["metrics"]["final"]
        for arm, clip in (("default-clip", 0.1), ("default-max-norm", 0.1), ("default-clip", 3.0))
    )
    assert inside == pytest.approx(outside, abs=2e-3)
    assert abs(other - outside) > 5e-3


def test_changes_reach_what_they_name() -> None:
    model = GPT(SIZE.model())
    assert Step("low-beta2", model, 1.0, {"beta2": 0.5}).optimizers[0].param_groups[0]["betas"] == (
        0.9,
        0.5,
    )
    (spam,) = Step("spam", model, 1.0, {"theta": 7.0}).optimizers
    assert (spam.theta, spam.interval) == (7.0, 80)
    (ours,) = Step("default-max-norm", model, 1.0, {"clip": 0.5}).optimizers
    assert ours._max_grad_norm == 0.5
    assert arm_named("default", {"alpha": 3.0}).controller == replace(
        arm_named("default").controller, alpha=3.0
    )
    with pytest.raises(ValueError, match=r"adamw has neither controller nor peer: .* no alpha"):
        arm_named("adamw", {"alpha": 1.0})
    with pytest.raises(TypeError, match="sigma"):
        Step("zclip", model, 1.0, {"sigma": 1.0})
