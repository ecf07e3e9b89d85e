"""Penalised parameters without a gradient: a head that the batch does not use, another task's."""

import copy

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, gradients, make, parameters

from ars import ARSAdam, ARSAdamW, ARSConfig, GradientRelease, reference

SHAPES = ((5,), (9, 16), (3,))


class Rows(Pull):
    """A penalty with a gradient of its own: the same pull, by a buffer."""

    def terms(self):
        return []

    def gradients(self):
        self.buffers = [(p, torch.zeros_like(p, dtype=torch.float32)) for p, _, _ in self.rows]
        return self.buffers

    def refresh(self):
        for (p, anchor, importance), (_, buffer) in zip(self.rows, self.buffers, strict=True):
            buffer.copy_(reference.ewc_gradient(p.float(), anchor, importance, self.strength))
        return self.value()

    def value(self):
        return sum(reference.ewc_value(p.float(), a, o, self.strength) for p, a, o in self.rows)


def value_of(penalty):
    rows, strength = penalty.rows, penalty.strength
    return sum(reference.ewc_value(p.detach().float(), a, o, strength) for p, a, o in rows)


def use(params, step):
    """Give all a gradient but one, another one at every other step."""
    gradients(params, step)
    params[step // 2 % len(params)].grad = None


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.5}, {"amsgrad": True}])
@pytest.mark.parametrize("penalty", [Pull, Rows])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_coupled_is_the_loss_plus_the_penalty(implementation, penalty, settings):
    """Against torch's optimizer, whose gradients get the penalty's by autograd."""
    params, plain = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    pull = penalty(params)
    options = {"lr": 0.01, "ars": None, "weight_decay": 0.0, **settings}
    ours = make(implementation, params, penalty=pull, **options)
    theirs = torch.optim.Adam(plain, lr=0.01, amsgrad="amsgrad" in settings)
    for step in range(8):
        use(params, step)
        use(plain, step)
        if "max_grad_norm" in settings:
            torch.nn.utils.clip_grad_norm_(plain, 0.5)
        rows = zip(plain, pull.rows, strict=True)
        value = sum(reference.ewc_value(p, a, o, pull.strength) for p, (_, a, o) in rows)
        value.backward()
        ours.step()
        theirs.step()
        assert float(ours.diagnostics["penalty"]) == pytest.approx(value.item(), rel=1e-5)
    for a, b in zip(params, plain, strict=True):
        # Eight updates of float32, summed in another order.
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cls", [ARSAdam, ARSAdamW])
def test_what_has_no_gradient_does_not_decay(implementation, cls):
    results = []
    for decay in (0.0, 0.5):
        params = parameters(shapes=SHAPES)
        optimizer = make(
            implementation, params, cls, lr=0.1, penalty=Pull(params), weight_decay=decay
        )
        gradients(params, 0)
        params[0].grad = None
        optimizer.step(loss=1.0)
        results.append(params)
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


def proximal_by_hand(param, row, state, group, lr):
    """Equation (9), in double precision, from the state as it was."""
    _, anchor, importance = row
    step = float(state["step"]) if "step" in state else 0.0
    v = state.get("max_exp_avg_sq", state.get("exp_avg_sq", torch.zeros_like(param)))
    beta2 = group["betas"][1]
    root = v.double().sqrt() / (1 - beta2**step) ** 0.5 if step else v.double()
    q = lr * 3.0 * importance.double() / (root + group["eps"])
    return anchor.double() + (param.detach().double() - anchor.double()) / (1 + q)


@pytest.mark.parametrize("settings", [{"ars": None}, {}, {"amsgrad": True}])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_proximal_takes_its_own_step_and_none_of_adams(implementation, settings):
    params = parameters(shapes=SHAPES)
    penalty = Pull(params, mode="proximal")
    optimizer = make(implementation, params, lr=0.01, penalty=penalty, **settings)
    for step in range(6):
        unused = step // 2 % len(params)
        use(params, step)
        state = {k: v.clone() for k, v in optimizer.state.get(params[unused], {}).items()}
        expected = proximal_by_hand(
            params[unused], penalty.rows[unused], state, optimizer.param_groups[0], 0.01
        )
        value = value_of(penalty)
        optimizer.step(loss=1.0)
        # Float32 against float64.
        torch.testing.assert_close(params[unused].detach().double(), expected, rtol=1e-5, atol=1e-6)
        for key, before in state.items():
            assert torch.equal(optimizer.state[params[unused]][key], before)
        assert float(optimizer.state[params[unused]]["step"]) == float(state.get("step", 0))
        assert float(optimizer.diagnostics["penalty"]) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("config", [ARSConfig(), ARSConfig.paper(), ARSConfig(gate=("lr", "grad"))])
def test_implementations_agree(config, mode):
    results = []
    for implementation in IMPLEMENTATIONS:
        params = parameters(shapes=SHAPES)
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.02, "weight_decay": 0.1}]
        penalty = Pull(params, mode=mode)
        optimizer = make(implementation, groups, lr=0.05, penalty=penalty, ars=config)
        for step in range(16):
            use(params, step)
            optimizer.step(loss=100.0 if step == 13 else 1.0)
        results.append([*params, optimizer.diagnostics["penalty"].float()])
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # an ulp a step


@pytest.mark.parametrize("penalty", [Pull, Rows])
@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_any_gradient_nothing_happens(implementation, mode, penalty):
    params = parameters(shapes=SHAPES)
    optimizer = make(implementation, params, lr=0.1, penalty=penalty(params, mode=mode))
    gradients(params, 0)
    optimizer.step(loss=1.0)
    before, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    for param in params:
        param.grad = None
    optimizer.step(loss=1.0)
    assert all(map(torch.equal, params, before))
    for key, value in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(state["state"][key][k]))
            for k, v in value.items()
        )
    assert torch.equal(optimizer.controller.counts, state["controller"]["counts"])


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_frozen_parameter_is_left_alone(implementation, mode):
    params = parameters(shapes=SHAPES)
    params[0].requires_grad_(False)
    optimizer = make(implementation, params, lr=0.1, penalty=Pull(params, mode=mode))
    before = params[0].clone()
    gradients(params[1:], 0)
    optimizer.step(loss=1.0)
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_found_inf_moves_nothing(implementation, mode):
    params = parameters(shapes=SHAPES)
    optimizer = make(implementation, params, lr=0.1, penalty=Pull(params, mode=mode))
    for step in range(2):
        use(params, step)
        optimizer.step(loss=1.0)
    before, report = copy.deepcopy(params), optimizer._buffer.clone()
    optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.full((1,), 8.0)
    use(params, 1)
    optimizer.step(loss=1.0)
    assert all(map(torch.equal, params, before))
    assert torch.equal(optimizer._buffer.nan_to_num(), report.nan_to_num())
    optimizer.found_inf = torch.zeros(1)
    optimizer.step(loss=1.0)
    assert not torch.equal(params[1], before[1])


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("implementation", ["loop", "triton"])
@pytest.mark.parametrize("how", ["master_weights", "stochastic_rounding"])
def test_bfloat16_follows_small_pulls(implementation, how, mode):
    """Pulls that are each far below half a unit of bfloat16; the mean of 512 elements."""
    # The interpreter is slow; a master weight has to reach the next number of bfloat16.
    pulls = 20 if implementation == "triton" and how == "stochastic_rounding" else 40
    used, unused = (torch.ones(512, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    penalty = Pull([unused], mode=mode)
    penalty.rows = [(unused, torch.zeros(512), torch.ones(512))]
    optimizer = make(
        implementation, [used, unused], lr=1e-4, penalty=penalty, ars=None, **{how: True}
    )
    used.grad, unused.grad = torch.ones_like(used), torch.ones_like(unused)
    penalty.strength = 0.0
    optimizer.step(loss=1.0)
    with torch.no_grad():
        unused.fill_(1.0)
    if how == "master_weights":
        optimizer.state[unused]["param_remainder"].zero_()
    unused.grad = None
    penalty.strength = 1.0
    for _ in range(pulls):
        optimizer.step(loss=1.0)
    # By (1 + 1e-4)^-pulls if proximal; coupled, Adam moves by at most 1e-4 a step.
    assert abs(float(unused.detach().float().mean()) - (1 - 1e-4 * pulls)) <= 6e-4
    if how == "stochastic_rounding" and pulls == 40:
        assert float((unused == 1.0).float().mean()) < 0.85  # not the same elements at every step


@pytest.mark.parametrize("penalty", [Pull, Rows])
@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_release_is_the_ordinary_step(implementation, mode, penalty):
    results = []
    for released in (False, True):
        params = parameters(shapes=SHAPES)
        optimizer = make(implementation, params, lr=0.1, penalty=penalty(params, mode=mode))
        release = GradientRelease(optimizer) if released else None
        for step in range(5):
            optimizer.zero_grad()
            loss = sum((p - i).square().sum() for i, p in enumerate(params) if i != step // 2)
            if release is None:
                loss.backward()
                optimizer.step(loss=loss)
            else:
                release.backward(loss)
                assert all(param.grad is None for param in params)
        results.append([*params, optimizer.diagnostics["penalty"].float()])
        del release
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)  # the sum of the penalty's parts


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
def test_strided_parameters_are_pulled_too(mode):
    results = []
    for strided in (False, True):
        params = parameters(shapes=SHAPES)
        if strided:
            params[1].data = params[1].data.T.contiguous().T
        optimizer = ARSAdamW(params, lr=0.1, penalty=Pull(params, mode=mode))
        gradients(params, 0)
        params[1].grad = None
        optimizer.step(loss=1.0)
        results.append(params[1].detach())
    torch.testing.assert_close(*results)


def test_the_gradients_of_zero_take_one_memory():
    params = parameters(shapes=((7,), (4, 3), (3, 4)))
    optimizer = ARSAdamW(params, penalty=Pull(params))
    gradients(params[:1], 0)
    optimizer.step(loss=1.0)
    zeros = optimizer._collector._cached.zeros.values()
    assert len({zero.untyped_storage().data_ptr() for zero in zeros}) == 1
    assert all(param.grad is None for param in params[1:])


def test_numbers_written_between_steps_reach_what_has_no_gradient():
    params = parameters(shapes=SHAPES)
    optimizer = make("triton", params, lr=0.1, penalty=Pull(params), weight_decay=0.1)
    gradients(params, 0)
    params[0].grad = None
    optimizer.step(loss=1.0)
    memory = optimizer._steppers.triton._hyper
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.write_hyperparameters()
    assert optimizer._steppers.triton._hyper is memory  # where a captured graph reads
    assert memory[:, 0].tolist() == [0.05, 0.05]
    assert memory[:, 4].tolist() == [0.1, 0.0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_misfit_that_only_the_penalty_moves_is_refused(implementation):
    params = parameters(shapes=SHAPES)
    optimizer = make(implementation, params, lr=0.1, penalty=Pull(params, mode="proximal"))
    gradients(params, 0)
    optimizer.step(loss=1.0)
    params[1].grad, params[1].data = None, torch.ones(90, 16)
    before = copy.deepcopy(params)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 has shape \(9, 16\)"):
        optimizer.step(loss=1.0)
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_proximal_pull_follows_a_step_count_that_was_edited(implementation):
    """Products of gated betas are of the old count then: powers of the new one take their place."""
    params = parameters(shapes=SHAPES)
    penalty = Pull(params, mode="proximal")
    config = ARSConfig(gate=("betas",), threshold=1e9)
    optimizer = make(implementation, params, lr=0.01, penalty=penalty, ars=config)
    for step in range(3):
        gradients(params, step)
        optimizer.step(loss=1.0)
    optimizer.state[params[0]]["step"].fill_(1.0)
    params[0].grad = None
    state, group = optimizer.state[params[0]], optimizer.param_groups[0]
    expected = proximal_by_hand(params[0], penalty.rows[0], state, group, 0.01)
    optimizer.step(loss=1.0)
    # Float32 against float64.
    torch.testing.assert_close(params[0].detach().double(), expected, rtol=1e-5, atol=1e-6)
