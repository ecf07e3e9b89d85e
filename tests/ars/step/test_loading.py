"""A state dict that cannot be loaded changes nothing, whatever is wrong with it."""

import copy
import io
import math
import random
import threading

import pytest
import torch
from optimizers import Pull, gradients, parameters, train

from ars import ARSAdam, ARSAdamW, ARSConfig, ARSOptimizer

SHAPES = ((5,), (2, 3), (4,))
BUILDS = {
    "ARSAdamW": ARSAdamW,
    "betas": lambda params: ARSAdamW(params, ars=ARSConfig.paper(), amsgrad=True),
    "plain": lambda params: ARSAdamW(params, ars=None),
    "ARSAdam": ARSAdam,
    "master": lambda params: ARSAdamW(params, master_weights=True),
    "penalty": lambda groups: ARSAdamW(
        groups, penalty=Pull([p for g in groups for p in g["params"]]), max_grad_norm=1.0
    ),
    "ARSOptimizer": lambda params: ARSOptimizer(torch.optim.AdamW(params)),
    "momentum": lambda params: ARSOptimizer(torch.optim.SGD(params, lr=0.1, momentum=0.9)),
    "RMSprop": lambda params: ARSOptimizer(torch.optim.RMSprop(params)),
    "wrapped": lambda params: ARSOptimizer(ARSAdamW(params, ars=None)),
}


def build(name):
    params = parameters(torch.bfloat16 if name == "master" else torch.float32, shapes=SHAPES)
    optimizer = BUILDS[name]([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}])
    return optimizer, params


def trained(name, steps):
    optimizer, params = build(name)
    train(optimizer, params, steps, loss=1.0)
    return optimizer, params


def bits(value):
    """What a state dict holds, so that == compares tensors bit by bit."""
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        file = io.BytesIO()
        torch.save(value.detach().clone(), file)
        return file.getvalue()
    return repr(value)


def whole(optimizer):
    """All that a step reads: the state dict, and what is not in it."""
    names = ("_watches", "_implementation", "_penalty")
    rest = {name: getattr(optimizer, name, None) for name in names}
    return bits(optimizer.state_dict()) | {name: id(value) for name, value in rest.items()}


def entry(saved, index=1):
    return saved["state"][index]


def put(what, value):
    return lambda saved: entry(saved).update({what: value})


def put_group(what, value):
    return lambda saved: saved["param_groups"][1].update({what: value})


def put_controller(what, value):
    return lambda saved: saved["controller"].update({what: value})


def scaled(value):
    return lambda saved: saved["controller"]["gate_state"].mul_(0).add_(value)


DAMAGES = {
    "step-nan": (put("step", torch.tensor(math.nan)), ValueError, "step of parameter 1"),
    "step-infinite": (put("step", math.inf), ValueError, "step of parameter 1"),
    "step-negative": (put("step", torch.tensor(-1.0)), ValueError, "step of parameter 1"),
    "step-fraction": (put("step", 2.5), ValueError, "step of parameter 1"),
    "step-missing": (lambda s: entry(s).pop("step"), ValueError, "parameter 1 .*lacks 'step'"),
    "step-shape": (put("step", torch.ones(2)), ValueError, r"parameter 1 .* shape \(2,\)"),
    "step-text": (put("step", "3"), TypeError, "step of parameter 1 .*must be a number"),
    "step-complex": (put("step", torch.tensor(1j)), TypeError, "must be a real number"),
    "moment-missing": (lambda s: entry(s).pop("exp_avg"), ValueError, "lacks 'exp_avg'"),
    "moment-shape": (put("exp_avg", torch.ones(3)), ValueError, r"exp_avg of parameter 1 .*\(3,\)"),
    "moment-integers": (
        put("exp_avg_sq", torch.ones(2, 3, dtype=torch.int64)), TypeError, "exp_avg_sq of param",
    ),
    "moment-complex": (put("exp_avg", torch.ones(2, 3) * 1j), TypeError, "exp_avg of parameter 1"),
    "moment-sparse": (
        put("exp_avg", torch.ones(2, 3).to_sparse()), TypeError, "exp_avg of .*sparse",
    ),
    "moment-list": (put("exp_avg", [1.0]), TypeError, "exp_avg of .* saved as a list"),
    "entry-list": (lambda s: s["state"].update({1: []}), TypeError, "saved state of parameter 1"),
    "state-missing": (lambda s: s.pop("state"), ValueError, "no 'state'"),
    "state-list": (lambda s: s.update(state=[]), TypeError, "'state' .* is a list"),
    "state-stranger": (lambda s: s["state"].update({7: {}}), ValueError, r"\[7\] .* no parameter"),
    "groups-missing": (lambda s: s.pop("param_groups"), ValueError, "no 'param_groups'"),
    "groups-fewer": (lambda s: s["param_groups"].pop(), ValueError, "belong|number of param"),
    "group-none": (lambda s: s["param_groups"].append(None), TypeError, "group 2 .* no dict"),
    "params-missing": (lambda s: s["param_groups"][1].pop("params"), TypeError, "group 1"),
    "params-twice": (put_group("params", [1]), ValueError, "stands twice"),
    "params-more": (put_group("params", [2, 3]), ValueError, "doesn't match the size"),
    "params-odd": (put_group("params", [[2]]), TypeError, r"names a parameter by \[2\]"),
    "lr-nan": (put_group("lr", math.nan), ValueError, "lr in group 1"),
    "lr-negative": (put_group("lr", -0.1), ValueError, "lr in group 1 .* got -0.1"),
    "lr-text": (put_group("lr", "fast"), (TypeError, ValueError), "in group 1"),
    "lr-missing": (lambda s: s["param_groups"][1].pop("lr"), ValueError, "no '?lr"),
    "lr-pair": (put_group("lr", torch.ones(2)), ValueError, "in group 1"),
    "betas-large": (put_group("betas", (0.9, 1.0)), ValueError, "betas in group 1"),
    "betas-one": (put_group("betas", (0.9,)), TypeError, "betas in group 1 .*must be 2 numbers"),
    "eps": (put_group("eps", -1.0), ValueError, "eps in group 1"),
    "weight-decay": (put_group("weight_decay", math.inf), ValueError, "weight_decay in group 1"),
    "amsgrad": (put_group("amsgrad", "no"), TypeError, "amsgrad in group 1"),
    "controller-text": (lambda s: s.update(controller="x"), TypeError, "controller's state"),
    "window-missing": (lambda s: s["controller"].pop("window"), ValueError, "lacks 'window'"),
    "window-nan": (
        lambda s: s["controller"]["window"].fill_(math.nan), ValueError, "controller's 'window'",
    ),
    "window-shape": (put_controller("window", torch.zeros(3)), ValueError, "'window' .*ARSConfig"),
    "window-integers": (put_controller("window", torch.zeros(50).int()), TypeError, "'window'"),
    "counts": (put_controller("counts", torch.tensor([3, 1])), ValueError, "'counts'"),
    "counts-floats": (put_controller("counts", torch.ones(2)), TypeError, "'counts'"),
    "gate-nan": (scaled(math.nan), ValueError, "'gate_state'"),
    "gate-large": (scaled(2.0), ValueError, "'gate_state'"),
    "watches": (put_controller("watches", 3), ValueError, "has watched 3"),
}  # fmt: skip


PRODUCTS = {
    "nan": (put("beta_products", torch.full((2,), math.nan).double()), ValueError),
    "large": (put("beta_products", torch.tensor([0.5, 1.5]).double()), ValueError),
    "shape": (put("beta_products", torch.ones(3).double()), ValueError),
    "list": (put("beta_products", [0.9, 0.99]), TypeError),
    "step-nan": (put("beta_products_step", math.nan), ValueError),
    "step-text": (put("beta_products_step", "2"), TypeError),
}
REFUSED = [
    pytest.param(name, *damage, id=f"{name}-{kind}")
    for kind, damage in DAMAGES.items()
    for name in ("ARSAdamW", "ARSAdam", "ARSOptimizer")
]
REFUSED += [
    pytest.param("betas", spoil, error, "beta_products.* of parameter 1", id=f"products-{kind}")
    for kind, (spoil, error) in PRODUCTS.items()
]
REFUSED += [
    pytest.param(
        "ARSAdam", put_group("decoupled_weight_decay", True), ValueError,
        "decoupled_weight_decay=True and some False", id="ARSAdam-decay",
    ),
    pytest.param(
        "momentum", put("momentum_buffer", torch.ones(3)), ValueError,
        "momentum_buffer of parameter 1 .* was saved with shape", id="momentum-shape",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "error", "message"), REFUSED)
def test_a_refused_state_changes_nothing(name, spoil, error, message):
    optimizer, params = trained(name, 4)
    saved = copy.deepcopy(trained(name, 2)[0].state_dict())
    saved["param_groups"][0]["lr"] = 9.0  # which must not arrive
    spoil(saved)
    before = whole(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    for no_state in (None, [], "x"):
        with pytest.raises(TypeError, match="must be a dict"):
            optimizer.load_state_dict(no_state)
    assert whole(optimizer) == before
    twin, others = trained(name, 4)
    for a, b in zip(
        train(optimizer, params, 2, first=4, loss=1.0),
        train(twin, others, 2, first=4, loss=1.0),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", BUILDS)
def test_a_hook_that_fails_leaves_the_optimizer_as_it_was(name):
    optimizer, _ = trained(name, 3)
    saved = copy.deepcopy(trained(name, 1)[0].state_dict())
    before = whole(optimizer)

    def fail(optimizer):
        raise ArithmeticError("a user's own")

    handle = optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(ArithmeticError):
        optimizer.load_state_dict(saved)
    assert whole(optimizer) == before
    handle.remove()
    optimizer.load_state_dict(saved)
    assert whole(optimizer) != before


REPLACEMENTS = [
    None, True, 0, -1, 1, 3.5, math.nan, math.inf, 1e308, "", "x", b"x", [], [0], (), {},
    (0.5, 0.5), {"step": 1}, {0: {}}, object(), 1j, torch.tensor(math.nan), torch.tensor(2.0),
    torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2, 3).double(),
    torch.ones(2, 3).half(), torch.full((2, 3), math.nan), torch.ones(5).to_sparse(),
    torch.tensor(1j), torch.tensor(True),
    torch.zeros(0), torch.zeros(50), torch.zeros(5).double(), torch.empty(5, device="meta"),
]  # fmt: skip


def damage(value, draw):
    """Return a damaged copy: at one place, something is gone, exchanged or another."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
        value = copy.copy(value)
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if draw.random() < 0.15:
            del value[key]
        elif draw.random() < 0.1:
            other = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
            value[key], value[other] = value[other], value[key]
        else:
            value[key] = damage(value[key], draw)
        return value
    if isinstance(value, torch.Tensor) and value.numel() and draw.random() < 0.4:
        value = value.clone()
        bad = draw.choice([math.nan, math.inf, -1.0, 0.0, 1e30])
        if value.is_floating_point():
            value.view(-1)[draw.randrange(value.numel())] = bad
            return value
    return draw.choice(REPLACEMENTS)


def refusal(optimizer, state_dict):
    """Load a state dict; return why it was refused, or None."""
    try:
        optimizer.load_state_dict(state_dict)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", BUILDS)
def test_damage_at_random_is_refused_whole_or_loads_to_something_that_steps(name):
    saved = copy.deepcopy(trained(name, 2)[0].state_dict())
    optimizer, _ = trained(name, 3)
    before = whole(optimizer)
    refused = 0
    for run in range(200):
        damaged = damage(saved, random.Random(run))
        error = refusal(optimizer, damaged)
        if error is not None:
            assert len(error) > 20, (run, error)
            assert whole(optimizer) == before, run
            refused += 1
            continue
        again = copy.deepcopy(optimizer.state_dict())  # it can be saved, and loaded
        optimizer.load_state_dict(again)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        watches = (again.get("controller") or {}).get("watches")
        gradients(params, run)
        optimizer.step(**({} if watches == "grad_norm" else {"loss": 1.0}))
        for param in params:
            step = optimizer.state.get(param, {}).get("step", 0)
            assert math.isfinite(float(step)), run
        optimizer, _ = trained(name, 3)
        before = whole(optimizer)
    assert 50 < refused < 200


@pytest.mark.parametrize("name", BUILDS)
def test_state_dicts_may_be_taken_by_threads(name):
    optimizer, _ = trained(name, 2)
    expected = bits(optimizer.state_dict())
    errors = []

    def take():
        for _ in range(300):
            try:
                optimizer.state_dict()
            except Exception as error:  # of whatever kind
                errors.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert bits(optimizer.state_dict()) == expected


@pytest.mark.parametrize("clone", [lambda optimizer: optimizer, copy.deepcopy])
def test_hooks_of_users_see_the_controller(clone):
    optimizer = clone(trained("ARSAdamW", 2)[0])
    seen = []
    for prepend in (False, True):
        optimizer.register_state_dict_post_hook(
            lambda _, state_dict: seen.append("controller" in state_dict), prepend=prepend
        )
    state_dict = optimizer.state_dict()
    assert seen[-1]
    assert set(state_dict) == {"state", "param_groups", "controller"}
