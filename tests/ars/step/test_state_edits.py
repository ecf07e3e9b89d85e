"""Edits of ``opt.state`` between steps, drawn at random: what torch's AdamW does for the same."""

import gc
import random
import weakref

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, make

from ars import ARSAdamW, ARSConfig, GradientRelease

SETTINGS = {"lr": 0.1, "weight_decay": 0.05}
CONFIGS = {
    "plain": None,
    "rate": ARSConfig(),
    # Phi is 1 whatever happens: the products of the betas are powers, but kept as products.
    "betas": ARSConfig(gate=("betas",), phi_min=1.0),
}
# A few roundings of 6e-8 or 1e-16 a step, of steps of 0.1.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-13}


class Edited:
    """An optimizer, and edits of it: all take the same random numbers for the same seed."""

    def __init__(self, build, dtype):
        generator = torch.Generator().manual_seed(0)
        shapes = [(6, 3), (6, 3), (5,), (4, 2)]
        params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        params = [torch.nn.Parameter(param) for param in params]
        self.optimizer = build([{"params": params[:3]}, {"params": params[3:], "lr": 0.05}])

    @property
    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def has_state(self, param):
        return bool(self.optimizer.state.get(param))

    def moments(self, param):
        return [self.optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq")]

    def put(self, param, new, rows):
        """Put a parameter in another's place, as density control of Gaussian splatting does."""
        new = torch.nn.Parameter(new)
        state = self.optimizer.state.pop(param, None)
        if state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = rows(state[name])
            self.optimizer.state[new] = state
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is param else p for p in group["params"]]

    # The edits.

    def zero_rows(self, draw, param):
        for moment in self.moments(param):
            moment[: draw.randint(1, len(param))] = 0

    def zero_moments_and_step(self, draw, param):
        for moment in self.moments(param):
            moment.zero_()
        self.optimizer.state[param]["step"].zero_()

    def set_step(self, draw, param):
        self.optimizer.state[param]["step"].fill_(draw.randint(0, 30))

    def replace_step(self, draw, param):
        self.optimizer.state[param]["step"] = torch.tensor(float(draw.randint(0, 3)))

    def replace_moments(self, draw, param):
        state = self.optimizer.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name] * 0.5

    def forget(self, draw, param):
        del self.optimizer.state[param]

    def forget_all(self, draw, param):
        self.optimizer.state.clear()

    def remove_rows(self, draw, param):
        keep = torch.arange(len(param)) % 3 != draw.randint(0, 2)
        self.put(param, param.detach()[keep].clone(), lambda moment: moment[keep].clone())

    def duplicate_rows(self, draw, param):
        rows = [*range(len(param)), *draw.sample(range(len(param)), k=min(2, len(param)))]
        self.put(param, param.detach()[rows].clone(), lambda moment: moment[rows].clone())

    def append_fresh_rows(self, draw, param):
        def longer(tensor):
            return torch.cat([tensor, torch.zeros_like(tensor[:2])])

        self.put(param, longer(param.detach()), longer)

    def swap_states(self, draw, param):
        alike = [p for p in self.params if p.shape == param.shape and self.has_state(p)]
        first, last = alike[0], alike[-1]
        state = self.optimizer.state
        state[first], state[last] = state[last], state[first]

    def load_again(self, draw, param):
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def turn(self, draw, param):
        if getattr(self.optimizer, "_implementation", None) != "triton":  # which wants one order
            param.data = param.data.t().contiguous().t()

    def move_memory(self, draw, param):
        for moment in self.moments(param):
            moment.data = moment.data.clone()

    def rate(self, draw, param):
        self.optimizer.param_groups[0]["lr"] = draw.uniform(0.01, 0.2)

    EDITS = (
        zero_rows, zero_moments_and_step, set_step, replace_step, replace_moments, forget,
        forget_all, remove_rows, duplicate_rows, append_fresh_rows, swap_states, load_again, turn,
        move_memory, rate,
    )  # fmt: skip

    def edit(self, draw):
        param = draw.choice([p for p in self.params if self.has_state(p)])
        for _ in range(draw.randint(1, 2)):
            draw.choice(self.EDITS)(self, draw, param)
            if not self.has_state(param):
                return

    def step(self, seed, release=None):
        generator = torch.Generator().manual_seed(seed)
        loss = 0.0
        for index, param in enumerate(self.params):
            gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
            missed = (seed + index) % 5 == 0
            param.grad = None if missed or release else gradient
            loss = loss if missed else loss + (param * gradient).sum()
        if release:
            release.backward(loss)
        else:
            self.optimizer.step()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "release"])
def test_edits_at_random_are_torchs(implementation, config, dtype):
    def ours(params):
        which = "fused" if implementation == "release" else implementation
        return make(which, params, ars=config, **SETTINGS)

    def theirs(params):
        return torch.optim.AdamW(params, **SETTINGS)

    tolerance = TOLERANCES[dtype]
    runs, steps = (1, 10) if implementation == "triton" else (3, 25)
    for run in range(runs):
        pair = [Edited(build, dtype) for build in (ours, theirs)]
        release = GradientRelease(pair[0].optimizer) if implementation == "release" else None
        for step in range(steps):
            if step:
                for edited in pair:
                    edited.edit(random.Random(1000 * run + step))
            pair[0].step(1 + step, release)
            pair[1].step(1 + step)
            for mine, its in zip(pair[0].params, pair[1].params, strict=True):
                torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)
                states = pair[0].optimizer.state[mine], pair[1].optimizer.state[its]
                for name, value in states[1].items():
                    torch.testing.assert_close(
                        states[0][name], value, rtol=tolerance, atol=tolerance
                    )
                mine.data.copy_(its.data)  # so that roundings do not add up
                for name in ("exp_avg", "exp_avg_sq") if states[1] else ():
                    states[0][name].copy_(states[1][name])


@pytest.mark.parametrize("released", [False, True])
def test_a_replaced_parameter_does_not_lose_its_penalty_without_a_word(released):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ARSAdamW([param], penalty=Pull([param]))
    release = GradientRelease(optimizer) if released else None

    def step(param):
        if release is not None:
            release.backward(param.sum())
        else:
            param.grad = torch.ones(3)
            optimizer.step(loss=1.0)

    step(param)
    new = torch.nn.Parameter(param.detach().clone())
    optimizer.state[new] = optimizer.state.pop(param)
    optimizer.param_groups[0]["params"] = [new]
    before = new.detach().clone()
    with pytest.raises(RuntimeError, match=r"shape \(3,\) that is in this optimizer no more.*anew"):
        step(new)
    assert torch.equal(new, before)
    assert float(optimizer.state[new]["step"]) == 1
    new.grad = None
    optimizer.penalty = Pull([new])
    step(new)
    assert float(optimizer.diagnostics["penalty"]) > 0


def test_replaced_parameters_do_not_stay_in_memory():
    optimizer = ARSAdamW([torch.nn.Parameter(torch.ones(3)) for _ in range(2)])
    with GradientRelease(optimizer) as release:
        gone = []
        for _ in range(4):
            params = optimizer.param_groups[0]["params"]
            release.backward(sum(param.sum() for param in params))
            new = [torch.nn.Parameter(param.detach().clone()) for param in params]
            for old, other in zip(params, new, strict=True):
                optimizer.state[other] = optimizer.state.pop(old)
            gone += map(weakref.ref, params)
            optimizer.param_groups[0]["params"] = new
        release.backward(sum(param.sum() for param in new))
        del params, old, other
        gc.collect()
        assert [one() for one in gone] == [None] * len(gone)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_set_back_makes_products_powers(implementation):
    """With a gate that has closed they are no powers, until the counter says they are of others."""
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = make(implementation, [param], lr=0.1, weight_decay=0.0, ars=ARSConfig.paper())
    state = optimizer.state[param]

    def step():
        param.grad = torch.ones(4)
        optimizer.step(loss=1.5)
        return float(optimizer.diagnostics["phi"])

    phi = step() * step()
    assert phi < 0.2
    assert state["beta_products"].tolist() == pytest.approx([0.9**2 * phi, 0.999**2 * phi])
    for taken in (0, 7):
        state["step"].fill_(taken)
        phi = step()
        expected = [0.9**taken * 0.9 * phi, 0.999**taken * 0.999 * phi]
        assert state["beta_products"].tolist() == pytest.approx(expected)
        assert float(state["beta_products_step"]) == float(state["step"]) == taken + 1
    # Started afresh: the update of a first step, lr towards the gradient.
    for name in ("step", "exp_avg", "exp_avg_sq"):
        state[name].zero_()
    before = param.detach().clone()
    step()
    torch.testing.assert_close(before - param.detach(), torch.full((4,), 0.1))


def test_products_edited_in_place_count_for_their_tensor_alone():
    results = []
    for implementation in ("loop", "fused"):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
        optimizer = make(implementation, params, ars=ARSConfig.paper())
        for step in range(4):
            if step == 2:
                optimizer.state[params[1]]["beta_products"].fill_(0.5)
            for index, param in enumerate(params):
                param.grad = torch.full((3,), float(index + step))
            optimizer.step(loss=1.0)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
def test_a_step_may_be_a_number_an_integer_or_of_one_dimension(implementation):
    """As users make it who fill the state before the first step."""
    kinds = [torch.zeros(1), torch.zeros((), dtype=torch.int64), 0]
    params = [torch.nn.Parameter(torch.ones(())) for _ in kinds]
    optimizer = make(implementation, params, lr=0.1, weight_decay=0.0)
    for param, kind in zip(params, kinds, strict=True):
        moments = {name: torch.zeros(()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": kind, **moments}
    for _ in range(3):
        for param in params:
            param.grad = torch.ones(())
        optimizer.step()
    for param in params:
        assert param.item() == pytest.approx(0.7)
        assert float(optimizer.state[param]["step"]) == 3


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("count", [None, "3"], ids=repr)
def test_a_step_that_is_no_number_is_refused(implementation, count):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = make(implementation, [param])
    param.grad = torch.ones(2)
    optimizer.step()
    before = param.detach().clone()
    optimizer.state[param]["step"] = count
    with pytest.raises(RuntimeError, match=f"step of parameter 0 of group 0 is {count!r}: set it"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("betas", [(0.9999999999, 0.999), (0.9, 0.9999999999)], ids=repr)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_betas_next_to_one_are_torchs(implementation, config, betas):
    """In float32 they are 1; the products of a gated step are given to a kernel that knows none."""
    results = []
    for ours in (True, False):
        param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        settings = {"lr": 0.1, "betas": betas}
        if ours:
            optimizer = make(implementation, [param], ars=CONFIGS[config], **settings)
        else:
            optimizer = torch.optim.AdamW([param], fused=True, **settings)
        for index in range(4):
            param.grad = torch.tensor([1.0, -0.5, 2.0]) * (1 + index % 2)
            optimizer.step()
        results.append(param.detach())
    # The same roundings as everywhere, and those of 1 - beta, which float32 cannot hold to the end.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", ["parameter", "exp_avg", "exp_avg_sq"])
def test_what_shares_memory_with_itself_is_refused_before_anything_moves(implementation, which):
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = make(implementation, params)
    for step in range(2):
        for param in params:
            param.grad = torch.ones(4, 3)
        if step == 0:
            optimizer.step()
    if which == "parameter":
        params[1].data = torch.zeros(3).expand(4, 3)
    else:
        optimizer.state[params[1]][which] = torch.zeros(3).expand(4, 3)
    before = [param.detach().clone() for param in params]
    with pytest.raises(
        RuntimeError, match=r"of parameter 1 of group 0 holds several .*: set .*clone"
    ):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert float(optimizer.state[params[0]]["step"]) == 1
