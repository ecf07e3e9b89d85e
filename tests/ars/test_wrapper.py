"""ARSOptimizer: what the base optimizer's step gets, what is put back, and when it is refused."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from optimizers import gradients, make, parameters

from ars import ARSAdamW, ARSConfig, ARSOptimizer
from ars.reference import controller, scalars
from ars.wrapper import _GatedGradients

MATRICES = ((3, 4), (17, 5))  # which is all that Muon takes
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True),
    "tensors": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}
ALL = ("betas", "lr", "grad")
BRAKING = ARSConfig.paper(window=6, gate=ALL)


def spiky(step):
    return torch.tensor(1.0 + 0.5 * (-1) ** step + (8.0 if step == 9 else 0.0))


def wrapped(name, config=BRAKING, shapes=MATRICES):
    params = parameters(shapes=shapes)
    return ARSOptimizer(BASES[name](params), config), params


def values_of(groups):
    """Every hyperparameter, tensors as their numbers."""
    return [
        {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in g.items() if k != "params"}
        for g in groups
    ]


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        gradients(params, step)
        optimizer.step(loss=spiky(step))
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize("name", BASES)
def test_with_an_open_gate_it_is_the_base_to_the_bit(name):
    opt, params = wrapped(name, ARSConfig(alpha=0.0, jitter=0.0, gate=ALL))
    others = parameters(shapes=MATRICES)
    base = BASES[name](others)
    for step in range(12):
        for p in (params, others):
            gradients(p, step)
        opt.step(loss=spiky(step))
        base.step()
    assert all(map(torch.equal, params, others))
    assert values_of(opt.param_groups) == values_of(base.param_groups)


@pytest.mark.parametrize("name", BASES)
def test_the_base_steps_with_effective_values_and_they_are_put_back(name):
    opt, params = wrapped(name, ARSConfig.paper(window=6, gate=ALL, jitter=0.4))
    kept = [group.copy() for group in opt.param_groups]
    before, seen = values_of(opt.param_groups), []
    opt.base.register_step_pre_hook(
        lambda *_: seen.append((values_of(opt.param_groups), [p.grad.clone() for p in params]))
    )
    for step in range(8):
        gradients(params, step)
        grads = [param.grad for param in params]
        copies = [grad.clone() for grad in grads]
        opt.step(loss=spiky(step))
        assert values_of(opt.param_groups) == before
        assert all(group[k] is v for group, old in zip(opt.param_groups, kept, strict=True)
                   for k, v in old.items())  # fmt: skip
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        assert all(map(torch.equal, grads, copies))
        phi, chi = (float(opt.diagnostics[k]) for k in ("phi", "chi"))
        assert phi < 0.7
        groups, scaled = seen[-1]
        group, old = groups[0], before[0]
        assert group["lr"] == pytest.approx(old["lr"] * (1 + chi) * phi, rel=1e-6)
        for k in {"betas", "momentum"} & set(old):
            assert group[k] == pytest.approx(torch.tensor(old[k]).double().mul(phi).tolist())
        unchanged = set(old) - {"lr", "betas", "momentum"}
        assert all(group[k] == old[k] for k in unchanged)
        for a, b in zip(scaled, copies, strict=True):
            torch.testing.assert_close(a, b * phi)
    assert chi != 0


@pytest.mark.parametrize("gate", [("lr",), ("grad",)])
def test_on_adamw_it_is_the_gate_of_arsadamw(gate):
    config = ARSConfig(window=12, threshold=0.2, significance=0.5, gate=gate, release=3)
    a, b = parameters(), parameters()
    ours = make("fused", a, lr=0.03, ars=config)
    opt = ARSOptimizer(torch.optim.AdamW(b, lr=0.03), config)
    low = 1.0
    for step in range(30):
        for params in (a, b):
            gradients(params, step)
        ours.step(loss=spiky(step))
        opt.step(loss=spiky(step))
        for name, value in opt.diagnostics.items():
            assert float(value) == float(ours.diagnostics[name])
        low = min(low, float(opt.diagnostics["phi"]))
    assert low < 0.5
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_on_adamw_the_first_step_of_gated_betas_is_that_of_arsadamw():
    a, b = parameters(), parameters()
    expected = run(make("fused", a, ars=ARSConfig.paper()), a, 1)
    found = run(ARSOptimizer(torch.optim.AdamW(b), ARSConfig.paper()), b, 1)
    for x, y in zip(expected, found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fused", "momentum"])
def test_all_is_put_back_when_the_base_raises(name):
    opt, params = wrapped(name)
    gradients(params, 0)
    opt.step(loss=1.0)
    before = values_of(opt.param_groups)
    grads = [param.grad for param in params]

    def fail(*_):
        raise RuntimeError("in the middle")

    opt.base.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        opt.step(loss=3.0)
    assert float(opt.diagnostics["phi"]) < 0.5
    assert values_of(opt.param_groups) == before
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))


def test_a_tensor_that_groups_share_is_gated_once():
    params = parameters(shapes=MATRICES)
    lr = torch.tensor(0.1)
    groups = [{"params": [param]} for param in params]
    opt = ARSOptimizer(torch.optim.SGD(groups, lr=lr), ARSConfig.paper(gate=("lr",)))
    assert opt.param_groups[0]["lr"] is opt.param_groups[1]["lr"]
    start = [param.detach().clone() for param in params]
    gradients(params, 0)
    opt.step(loss=1.0)
    phi = float(opt.diagnostics["phi"])
    for param, old in zip(params, start, strict=True):
        torch.testing.assert_close(param.detach(), old - 0.1 * phi * param.grad)
    assert opt.param_groups[0]["lr"] is lr
    assert float(lr) == float(torch.tensor(0.1))


class Descent(torch.optim.Optimizer):
    """Reads nothing of what it steps with."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)


@pytest.mark.parametrize("gate", [("lr",), ("lr", "grad")])
def test_with_a_tensor_rate_nothing_is_read_from_the_device(gate):
    """The numbers of the meta device cannot be read at all."""

    def meta(lr):
        param = torch.ones(3, device="meta", requires_grad=True)
        param.grad = torch.ones(3, device="meta")
        return ARSOptimizer(Descent([param], lr), ARSConfig(gate=gate))

    opt = meta(torch.ones((), device="meta"))
    for _ in range(2):
        opt.step()
    assert all(value.is_meta for value in opt.diagnostics.values())
    with pytest.raises(RuntimeError, match="meta"):
        meta(0.1).step()  # whose rate is a number, as the documentation says


def test_signals_that_stay_on_the_device_give_the_same_steps(monkeypatch):
    """Made so on a CPU, nothing may change."""
    results = []
    for name in ("fused", "momentum", "nadam"):
        opt, params = wrapped(name)
        expected = run(opt, params, 10)
        with monkeypatch.context() as patch:
            for module in (controller, scalars):
                patch.setattr(module, "is_host", lambda tensor: False)
            opt, params = wrapped(name)
            results.append((run(opt, params, 10), expected))
            assert 0.1 <= float(opt.diagnostics["phi"]) < 0.7
    for found, wanted in results:
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_the_norm_of_complex_gradients_is_a_surprise():
    """One of them conjugated without having been written so, as autograd leaves it."""
    params = [torch.ones(2, dtype=torch.complex64, requires_grad=True) for _ in range(2)]
    opt = ARSOptimizer(torch.optim.SGD(params, lr=0.1))
    params[0].grad = torch.tensor([3j, 0j])
    params[1].grad = torch.tensor([0j, 4.0]).conj()
    opt.step()
    assert float(opt.diagnostics["surprise"]) == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_gate_on_the_device_keeps_the_dtype_of_gradients(dtype):
    """Times a 0-d tensor of double precision, a 0-d gradient becomes one too."""
    params = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in ((), (3,))]
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    gated = _GatedGradients([{"params": params}], torch.tensor(0.5, dtype=torch.float64))
    gated.put()
    assert [param.grad.dtype for param in params] == [dtype, dtype]
    assert all((param.grad == 1).all() for param in params)


def test_no_gradient_is_no_observation():
    opt, _ = wrapped("momentum")
    opt.step(loss=1.0)
    assert opt.controller.counts.tolist() == [0, 0]
    assert math.isnan(float(opt.diagnostics["surprise"]))


def test_sparse_gradients_need_a_loss():
    table = torch.nn.Embedding(5, 2, sparse=True)
    opt = ARSOptimizer(torch.optim.SparseAdam(list(table.parameters()), lr=0.1),
                       ARSConfig(gate=("lr", "grad")))  # fmt: skip
    table(torch.tensor([1, 3])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*pass step\(loss=loss\)"):
        opt.step()
    assert torch.equal(table.weight, before)
    opt.step(loss=1.0)
    assert not torch.equal(table.weight, before)


def test_what_cannot_be_gated_is_refused_with_its_remedy():
    params = parameters(shapes=MATRICES)
    for name in ("sgd", "adafactor"):
        with pytest.raises(ValueError, match=r"neither betas nor a momentum.*gate=\('lr',\)"):
            ARSOptimizer(BASES[name](params), ARSConfig(gate=("betas",)))
        ARSOptimizer(BASES[name](params), ARSConfig(gate=("betas", "lr")))
    with pytest.raises(ValueError, match="ARSAdamW has a controller already: pass it ars=None"):
        ARSOptimizer(ARSAdamW(params))
    ARSOptimizer(ARSAdamW(params, ars=None))
    with pytest.raises(ValueError, match="ARSOptimizer has a controller already"):
        ARSOptimizer(ARSOptimizer(BASES["adamw"](params)))
    with pytest.raises(ValueError, match="differentiable=True"):
        ARSOptimizer(torch.optim.Adam(params, differentiable=True))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        ARSOptimizer(params)
    with pytest.raises(TypeError, match="must be an ARSConfig"):
        ARSOptimizer(BASES["adamw"](params), {"window": 5})
    rateless = BASES["adamw"](params)
    del rateless.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="no lr in group 0"):
        ARSOptimizer(rateless)


class Loose(Descent):
    """Takes any value, as transformers' Adafactor does: relative_step=True has lr=None."""

    def __init__(self, params, **values):
        torch.optim.Optimizer.__init__(self, params, {"lr": 0.1, **values})


def _in_words(values):
    """Without the addresses of functions, which differ between the processes of one test run."""
    return re.sub(r" at 0x\w+", "", repr(values))


REFUSED = (
    {"lr": None}, {"lr": "auto"}, {"lr": lambda: 0.1}, {"lr": {"w": 0.1}}, {"lr": 1j},
    {"lr": torch.tensor(1)}, {"lr": torch.tensor(1j)}, {"lr": (0.1, None)}, {"lr": [[0.1]]},
    {"betas": None}, {"betas": (None, 0.999)}, {"betas": [0.9, "0.999"]}, {"betas": "0.9"},
    {"betas": (0.9, 0.99, None)}, {"momentum": None}, {"momentum": lambda: 0.9},
    {"momentum": torch.tensor(1)}, {"betas": ((0.9,), 0.99)},
)  # fmt: skip
TAKEN = (
    {"lr": 1}, {"lr": np.float32(0.1)}, {"lr": torch.tensor(0.1)}, {"lr": torch.tensor([0.1])},
    {"lr": [0.1, 0.2]}, {"betas": (0.9,)}, {"betas": (0.9, 0.99, 0.999)}, {"betas": [0.9, 0.99]},
    {"betas": (torch.tensor(0.9), 0.99)}, {"betas": 0.9}, {"momentum": np.float64(0.5)},
    {"momentum": torch.tensor(0.5)}, {"betas": ()}, {"momentum": False},
)  # fmt: skip


@pytest.mark.parametrize("values", REFUSED, ids=_in_words)
def test_values_that_cannot_be_multiplied_are_refused_before_the_first_alarm(values):
    config = ARSConfig(gate=ALL)
    (name,) = values
    params = parameters(shapes=MATRICES)
    message = rf"Loose has {name}=.* in group 0, which the controller cannot multiply: give it"
    with pytest.raises(ValueError, match=message):
        ARSOptimizer(Loose(params, **values), config)
    opt = ARSOptimizer(Loose(params[:1], betas=(0.9, 0.99), momentum=0.5), config)
    for add in (values, {}):
        if not add:
            opt.base.defaults.update(values)
        with pytest.raises(ValueError, match=message):
            opt.add_param_group({"params": params[1:], **add})
        assert len(opt.param_groups) == 1
    state = opt.state_dict()
    state["param_groups"][0].update(values)
    before = opt.param_groups[0].copy()
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert opt.param_groups[0] == before
    opt.param_groups[0].update(values)  # and where it is put there later, nothing has been observed
    gradients(params, 0)
    for step in ({"loss": 1.0}, {}):
        with pytest.raises(ValueError, match=message):
            opt.step(**step)
    assert opt.controller.counts.tolist() == [0, 0]


@pytest.mark.parametrize("values", TAKEN, ids=repr)
def test_whatever_is_numbers_is_multiplied_and_put_back(values):
    params = parameters(shapes=MATRICES)
    base = Loose(params, **values)
    seen = []
    base.step = lambda: seen.append(copy.deepcopy(base.param_groups[0]))
    opt = ARSOptimizer(base, ARSConfig.paper(gate=ALL, jitter=0.0))
    gradients(params, 0)
    opt.step(loss=1.0)
    phi = float(opt.diagnostics["phi"])
    assert phi < 0.5
    for name, value in values.items():
        assert opt.param_groups[0][name] is value
        wanted = torch.as_tensor(value, dtype=torch.float64) * phi
        found = torch.as_tensor(seen[0][name], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "values",
    [{"lr": None}, {"lr": "auto"}, {"lr": [0.1, 0.2]}, {"betas": None}, {"momentum": None}],
    ids=repr,
)
def test_what_the_settings_leave_alone_may_be_anything(values):
    """The remedies that the errors name; also at a first step that may only make the state."""
    ((name, value),) = values.items()
    params = parameters(shapes=MATRICES)
    config = ARSConfig(gate=("grad",), jitter=0) if name == "lr" else ARSConfig(gate=("lr",))
    base = Loose(params, **values)
    seen = []
    base.step = lambda: seen.append(base.param_groups[0][name])
    opt = ARSOptimizer(base, config)
    for step in range(40):  # an alternation, in which there is jitter
        gradients(params, 0, scale=1.0 + step % 2)
        opt.step()
    assert float(opt.diagnostics["phi"]) < 0.5
    assert seen == [value] * 40
