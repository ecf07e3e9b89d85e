"""bfloat16 parameters without their loss: stochastic rounding, and float32 master weights."""

import io

import pytest
import torch
from optimizers import Pull, gradients, make, parameters

from ars import ARSAdamW, reference

# On a CPU these modes run in the loop; "triton" is its kernels in the interpreter.
both = pytest.mark.parametrize("implementation", ["loop", "triton"])
MODES = {"stochastic": {"stochastic_rounding": True}, "master": {"master_weights": True}}
mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)
SHAPES = ((5,), (4, 3), (2,))


def bf16():
    return parameters(torch.bfloat16, SHAPES)


def run(optimizer, params, steps, first=0):
    for seed in range(first, first + steps):
        gradients(params, seed)
        optimizer.step(loss=1.0)


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def master(optimizer, param):
    return reference.join_master(param, optimizer.state[param]["param_remainder"])


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True, "max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("pull", ["coupled", "proximal", None])
def test_master_weights_are_the_float32_run_bit_for_bit(pull, settings):
    """100 steps on the same gradients: rounded in the end as if it had been float32 throughout."""
    params, wide = bf16(), [p.detach().float().requires_grad_() for p in bf16()]
    build = {"lr": 1e-3, "foreach": False, **settings}
    penalty, plain = (
        (None, None) if pull is None else (Pull(params, mode=pull), Pull(wide, mode=pull))
    )
    ours = ARSAdamW(params, master_weights=True, penalty=penalty, **build)
    theirs = ARSAdamW(wide, penalty=plain, **build)
    for seed in range(100):
        gradients(params, seed)
        for a, b in zip(wide, params, strict=True):
            a.grad = b.grad.float()
        ours.step(loss=1.0)
        theirs.step(loss=1.0)
    for a, b in zip(params, wide, strict=True):
        assert torch.equal(master(ours, a), b)
        assert torch.equal(a, reference.split_master(b.detach())[0])
        assert ours.state[a]["exp_avg"].dtype == torch.float32


def test_a_stochastic_step_by_the_reference():
    """Parameter and moments rounded with the bits of (seed, step, number, element)."""
    params = bf16()
    optimizer = ARSAdamW(params, ars=None, stochastic_rounding=True, seed=7, amsgrad=True)
    before = [param.detach().clone() for param in params]
    gradients(params, 0)
    params[1].grad = None  # the numbers of those after it must not change
    optimizer.step()
    param, state = params[2], optimizer.state[params[2]]
    zeros = torch.zeros(param.shape)
    expected = reference.adam_step(
        before[2].float(), param.grad, zeros, zeros, zeros, lr=1e-3, beta1=0.9, beta2=0.999,
        correction1=1 - 0.9, correction2=1 - 0.999, eps=1e-8, weight_decay=0.01,
    )  # fmt: skip
    bits = reference.rounding_bits(param, seed=7, step=1, number=2)
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    ours = [param.detach(), *(state[name] for name in names)]
    for value, exact, random in zip(ours, expected, (*bits, bits[2]), strict=True):
        assert torch.equal(value, reference.stochastic_round(exact, torch.bfloat16, random))


@mode
@pytest.mark.parametrize("pull", ["coupled", "proximal", None])
def test_the_kernels_agree_with_the_loop(pull, options):
    """Up to a unit of bfloat16: rounding takes the other neighbour where the exact results differ
    in their last bit, which is rare."""

    def end(implementation):
        params = [*bf16(), *parameters(torch.float32, ((6,),))]
        penalty = None if pull is None else Pull(params, mode=pull)
        optimizer = make(implementation, params, penalty=penalty, max_grad_norm=1.0, **options)
        for seed in range(3):
            gradients(params, seed)
            if seed == 1:
                params[0].grad = None
            optimizer.step(loss=1.0)
        if "master_weights" in options:
            return torch.cat([master(optimizer, param).flatten() for param in params[:3]])
        return torch.cat([param.detach().flatten() for param in params[:3]]).float()

    ours, theirs = end("triton"), end("loop")
    if "master_weights" in options:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    else:
        assert int((ours != theirs).sum()) <= 1
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


@mode
def test_other_dtypes_are_as_before(options):
    def build():
        return [*bf16()[:1], *parameters(torch.float32, SHAPES[1:])]

    params, plain = build(), build()
    run(ARSAdamW(params, **options), params, 3)
    run(ARSAdamW(plain, foreach=False), plain, 3)
    assert all(map(torch.equal, params[1:], plain[1:]))


@mode
@both
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(implementation, options):
    straight, params = bf16(), bf16()
    optimizer = make(implementation, straight, **options)
    run(optimizer, straight, 8)
    first = make(implementation, params, **options)
    run(first, params, 4)
    second = make(implementation, params, **options)
    second.load_state_dict(saved(first))
    run(second, params, 4, first=4)
    for a, b in zip(params, straight, strict=True):
        assert torch.equal(a, b)
        assert second.state[a].keys() == optimizer.state[b].keys()
        for name, value in optimizer.state[b].items():
            assert torch.equal(second.state[a][name], value)
            assert second.state[a][name].dtype == value.dtype


@mode
def test_a_plain_state_is_taken_over_and_given_back(options):
    """float32 moments become the mode's, and the other way; a remainder is not left to rot."""
    params = bf16()
    plain = ARSAdamW(params)
    run(plain, params, 2)
    special = ARSAdamW(params, **options)
    special.load_state_dict(saved(plain))
    dtype = torch.bfloat16 if "stochastic_rounding" in options else torch.float32
    assert {special.state[p]["exp_avg"].dtype for p in params} == {dtype}
    run(special, params, 2, first=2)
    assert ("param_remainder" in special.state[params[0]]) == ("master_weights" in options)
    plain.load_state_dict(saved(special))
    assert {plain.state[p]["exp_avg_sq"].dtype for p in params} == {torch.float32}
    assert "param_remainder" not in plain.state[params[0]]
    run(plain, params, 2, first=4)


@mode
@pytest.mark.parametrize("explicit", [{"foreach": True}, {"fused": True}], ids=str)
def test_torchs_kernels_cannot(options, explicit):
    with pytest.raises(RuntimeError, match="leave both None for the loop"):
        ARSAdamW(bf16(), **options, **explicit)


@mode
def test_what_makes_no_sense_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=True is for bfloat16 parameters"):
        ARSAdamW(parameters(shapes=SHAPES), **options)
    with pytest.raises(ValueError, match=f"autograd cannot run through {name}=True"):
        ARSAdamW(bf16(), differentiable=True, **options)
    with pytest.raises(ValueError, match="cannot be True together"):
        ARSAdamW(bf16(), stochastic_rounding=True, master_weights=True)
    for seed in (-1, 2**63, 0.5):
        with pytest.raises(ValueError, match="seed must be an int"):
            ARSAdamW(bf16(), seed=seed, **options)


@mode
def test_a_group_that_is_added_later(options):
    params = bf16()
    optimizer = ARSAdamW(params[:1], **options)
    run(optimizer, params, 1)
    optimizer.add_param_group({"params": params[1:]})
    run(optimizer, params, 2, first=1)
    keys = {frozenset(optimizer.state[param]) for param in params}
    assert len(keys) == 1
