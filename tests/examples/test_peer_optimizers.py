"""What others do against spikes: their equations by hand, and what they are for."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from optimi import StableAdamW as OptimiStableAdamW

from stress.peer_optimizers import OPTIMIZERS, RULES, SPAM, AdaGC, SkipStep, StableAdamW, ZClip


def grads(*norms: float) -> list[torch.Tensor]:
    """One tensor a norm, none of them a single number."""
    return [torch.tensor([0.6 * norm, -0.8 * norm]) for norm in norms]


def norm(gradient: torch.Tensor) -> float:
    return float(gradient.norm())


# ------------------------------------------------------------------------------- ZClip


def test_zclip_by_hand() -> None:
    clip = ZClip(threshold=2.0, alpha=0.9, warmup=2)
    for value in (1.0, 3.0):  # collected, not clipped
        (g,) = grads(value)
        assert clip([g], 0.0)
        assert norm(g) == pytest.approx(value)
    assert (clip.mean, clip.variance) == (2.0, 1.0)
    (g,) = grads(3.9)  # z is 1.9
    assert clip([g], 0.0)
    assert norm(g) == pytest.approx(3.9)
    mean = 0.9 * 2.0 + 0.1 * 3.9
    variance = 0.9 * 1.0 + 0.1 * (3.9 - mean) ** 2
    assert (clip.mean, clip.variance) == pytest.approx((mean, variance))
    (g,) = grads(50.0)
    assert clip([g], 0.0)
    z = (50.0 - mean) / math.sqrt(variance)
    kept = mean + 4.0 / z * math.sqrt(variance)
    assert norm(g) == pytest.approx(kept)
    after = 0.9 * mean + 0.1 * kept  # the clipped norm, not 50
    after_variance = 0.9 * variance + 0.1 * (kept - after) ** 2
    assert (clip.mean, clip.variance) == pytest.approx((after, after_variance))


def test_zclip_takes_all_tensors_as_one_gradient() -> None:
    clip = ZClip(warmup=2)
    for value in (4.0, 6.0):
        clip(grads(0.6 * value, 0.8 * value), 0.0)
    spike = grads(300.0, 400.0)
    clip(spike, 0.0)
    kept = 5.0 + 2.5**2 / 495.0
    assert [norm(g) for g in spike] == pytest.approx([0.6 * kept, 0.8 * kept], rel=1e-5)


def test_zclip_clips_a_larger_spike_more() -> None:
    kept = []
    for spike in (20.0, 2000.0):
        clip = ZClip(warmup=4)
        for value in (1.0, 1.2, 0.8, 1.0):
            clip(grads(value), 0.0)
        (g,) = grads(spike)
        clip([g], 0.0)
        kept.append(norm(g))
    assert 1.0 < kept[1] < kept[0] < 1.5


# ------------------------------------------------------------------------------- AdaGC


def test_adagc_by_hand() -> None:
    clip = AdaGC(relative=1.5, beta=0.9, absolute=1.0, warmup=2)
    pair = grads(0.3, 0.4)
    clip(pair, 0.0)  # the whole norm is 0.5: not clipped
    assert [norm(g) for g in pair] == pytest.approx([0.3, 0.4])
    pair = grads(3.0, 4.0)  # 5: both by 1 / 5
    clip(pair, 0.0)
    assert [norm(g) for g in pair] == pytest.approx([0.6, 0.8])
    assert clip.gammas == pytest.approx([0.3, 0.4])  # the smaller of the two
    pair = grads(9.0, 0.5)  # only the first is above 1.5 times its own
    clip(pair, 0.0)
    assert [norm(g) for g in pair] == pytest.approx([0.45, 0.5])
    assert clip.gammas == pytest.approx([0.9 * 0.3 + 0.1 * 0.45, 0.9 * 0.4 + 0.1 * 0.5])


def test_adagc_lets_no_tensor_stop_for_ever_because_it_began_at_zero() -> None:
    clip = AdaGC(warmup=2)
    for pair in (grads(0.0, 1.0), grads(0.0, 1.0)):
        clip(pair, 0.0)
    late = grads(0.7, 1.0)
    clip(late, 0.0)
    assert [norm(g) for g in late] == pytest.approx([0.7, 1.0])
    spike = grads(70.0, 1.0)
    clip(spike, 0.0)
    assert norm(spike[0]) == pytest.approx(1.05 * 0.7)


def test_adagc_holds_the_spike_of_one_tensor_and_leaves_the_others() -> None:
    clip = AdaGC(warmup=3)
    for _ in range(10):
        clip(grads(1.0, 1.0, 1.0), 0.0)
    spike = grads(1.0, 1000.0, 1.0)
    usual = norm(grads(1.0)[0]) / math.sqrt(3)  # the warm-up clipped the whole to 1
    clip(spike, 0.0)
    assert norm(spike[1]) < 1.2 * max(usual, norm(spike[0]))
    assert norm(spike[0]) == pytest.approx(norm(spike[2]))


# ------------------------------------------------------------------------------- SkipStep


def test_skipped_steps_by_hand() -> None:
    skip = SkipStep(sigmas=2.0, window=4)
    for loss in (1.0, 3.0):
        assert skip(grads(1.0), loss)
    # Mean 2, deviation sqrt(2): the limit is 2 + 2 sqrt(2) = 4.83.
    assert skip(grads(1.0), 4.8)
    # Of 1, 3 and 4.8: mean 2.933, deviation 1.901, limit 6.735.
    assert not skip(grads(1.0), 6.8)
    # What was left out is remembered: 1, 3, 4.8, 6.8 have mean 3.9 and deviation 2.478, limit 8.86.
    assert skip(grads(1.0), 8.8)


def test_a_step_is_skipped_for_its_gradient_alone() -> None:
    skip = SkipStep(sigmas=3.0, window=4)
    for value in (1.0, 1.1, 0.9):
        assert skip(grads(value), 2.0)
    spike = grads(30.0)
    assert not skip(spike, 2.0)
    assert norm(spike[0]) == pytest.approx(30.0)


# ------------------------------------------------------------------------------- optimizers


def run(
    make: Callable[..., torch.optim.Optimizer],
    gradients: Sequence[torch.Tensor],
    **settings: object,
) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    optimizer = make([weight], **settings)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer


def normal(count: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(3, generator=generator) for _ in range(count)]


SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_stableadamw_is_that_of_optimi() -> None:
    gradients = [*normal(5), *normal(2, 50.0), *normal(5)]
    ours, _ = run(StableAdamW, gradients, **SETTINGS)
    theirs, _ = run(OptimiStableAdamW, gradients, **SETTINGS, triton=False, foreach=False)
    plain, _ = run(torch.optim.AdamW, gradients, **SETTINGS)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(ours, plain, rtol=0, atol=1e-3)


def test_stableadamw_takes_smaller_steps_where_the_second_moment_lags() -> None:
    gradients = [torch.ones(3)] * 20 + [torch.full((3,), 100.0)]
    moved = []
    for make in (StableAdamW, torch.optim.AdamW):
        before, _ = run(make, gradients[:-1], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
        after, _ = run(make, gradients, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
        moved.append(float((before - after).abs().max()))
    v = (1 - 0.99**20 + 0.0) * 0.99 + 0.01 * 100.0**2
    rms = 100.0 / math.sqrt(v / (1 - 0.99**21))
    assert rms > 4
    assert moved[0] == pytest.approx(moved[1] / rms, rel=1e-3)


def test_spam_is_adamw_while_nothing_happens() -> None:
    gradients = normal(20)
    settings = SETTINGS | {"theta": 1e9, "interval": 50, "warmup": 5}
    ours, _ = run(SPAM, gradients, **settings)
    assert torch.allclose(ours, run(torch.optim.AdamW, gradients, **SETTINGS)[0], atol=1e-6)


def test_spam_clips_entries_by_their_own_second_moment() -> None:
    weight = torch.zeros(2, requires_grad=True)
    optimizer = SPAM([weight], lr=0.0, betas=(0.9, 0.5), theta=4.0, interval=90, warmup=2)
    v = 0.0
    for _ in range(6):
        weight.grad = torch.tensor([1.0, -1.0])
        optimizer.step()
        v = 0.5 * v + 0.5
    weight.grad = torch.tensor([-100.0, 1.5])
    optimizer.step()
    assert weight.grad.tolist() == pytest.approx([-2 * math.sqrt(v), 1.5])


def test_spam_forgets_its_moments_and_begins_again_slowly() -> None:
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.0}
    ones = [torch.ones(3)] * 12
    weights = [run(SPAM, ones[:n], **settings, interval=8, warmup=4)[0] for n in range(13)]
    steps = [float((a - b)[0]) for a, b in pairwise(weights)]
    assert steps[6] == pytest.approx(0.1, rel=1e-3)  # step 7, before the reset
    # Step 8 begins anew: m = 0.1, v = 0.05, and the factor is that of n = 0.
    assert steps[7] == 0.0
    half = 1 - (1 + math.cos(math.pi * 2 / 4)) / 2
    m, v = (1 - 0.9**3) / (1 - 0.9**10), (1 - 0.95**3) / (1 - 0.95**10)
    assert steps[9] == pytest.approx(0.1 * half * m / math.sqrt(v), rel=1e-4)
    _, optimizer = run(SPAM, [*ones[:7], torch.zeros(3)], **settings, interval=8, warmup=4)
    (state,) = optimizer.state.values()
    assert state["exp_avg"].abs().max() == state["exp_avg_sq"].max() == 0.0


# ------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("make", [ZClip, AdaGC])
def test_a_gradient_that_is_not_finite_is_kept_from_the_moments(make: type) -> None:
    clip = make(warmup=2)
    for _ in range(3):
        clip(grads(1.0), 0.0)
    before = dict(vars(clip)) | {"gammas": list(getattr(clip, "gammas", []))}
    bad = grads(math.nan)
    assert clip(bad, 0.0)
    assert bad[0].tolist() == [0.0, 0.0]
    if make is ZClip:
        assert (clip.mean, clip.variance) == (before["mean"], before["variance"])
    else:
        assert clip.gammas == before["gammas"]


def test_skip_leaves_out_what_is_not_finite() -> None:
    skip = SkipStep(window=4)
    assert not skip(grads(math.inf), 1.0)
    assert not skip(grads(1.0), math.nan)
    assert skip(grads(1.0), 1.0)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (ZClip, {"threshold": 0.0}),
        (ZClip, {"alpha": 1.5}),
        (ZClip, {"warmup": 1}),
        (AdaGC, {"relative": -1.0}),
        (AdaGC, {"beta": 2.0}),
        (AdaGC, {"absolute": 0.0}),
        (AdaGC, {"warmup": -1}),
        (SkipStep, {"sigmas": 0.0}),
        (SkipStep, {"window": 3}),
    ],
)
def test_rules_refuse_settings_by_name(make: type, settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"^{name} must lie in"):
        make(**settings)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (SPAM, {"theta": 0.0}),
        (SPAM, {"interval": 0}),
        (SPAM, {"interval": 10, "warmup": 10}),
        (StableAdamW, {"lr": -1.0}),
        (StableAdamW, {"betas": (1.0, 0.9)}),
        (StableAdamW, {"eps": -1.0}),
        (StableAdamW, {"weight_decay": -1.0}),
    ],
)
def test_optimizers_refuse_settings_by_name(make: type, settings: dict[str, object]) -> None:
    name = [*settings][-1]
    with pytest.raises(ValueError, match=rf"^{name} must lie in"):
        make([torch.zeros(1, requires_grad=True)], **({"lr": 0.1} | settings))
    with pytest.raises(ValueError, match="takes no closure"):
        make([torch.zeros(1, requires_grad=True)], lr=0.1).step(lambda: 1.0)


def test_every_peer_is_in_a_table() -> None:
    assert set(RULES.values()) == {ZClip, AdaGC, SkipStep}
    assert set(OPTIMIZERS.values()) == {SPAM, StableAdamW}
