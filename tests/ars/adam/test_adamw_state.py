"""State: resuming, exchanging checkpoints with torch, pickling, dtypes."""

import copy
import io
import pickle

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, make, parameters, train

from ars import ARSAdamW, ARSConfig


def saved(optimizer):
    """Write a state dict to a file and read it back as a careful user would."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "config", [None, ARSConfig(window=5), ARSConfig.paper(window=5, release=9)]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(implementation, config):
    straight = parameters(shapes=((5,), (3, 4)))
    optimizer = make(implementation, straight, ars=config)
    expected = train(optimizer, straight, 14)

    params = parameters(shapes=((5,), (3, 4)))
    first = make(implementation, params, ars=config)
    train(first, params, 7)
    second = make(implementation, params, ars=config)
    second.load_state_dict(saved(first))
    result = train(second, params, 7, first=7)
    assert all(map(torch.equal, result, expected))
    assert float(second.diagnostics["phi"]) == float(optimizer.diagnostics["phi"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpoints_go_both_ways_with_torch(implementation):
    def run(build_first, build_second):
        params = parameters(shapes=((5,), (3, 4)))
        first = build_first(params)
        train(first, params, 5)
        second = build_second(params)
        second.load_state_dict(saved(first))
        return train(second, params, 5, first=5)

    def ours(params):
        return make(implementation, params, ars=None)

    def theirs(params):
        return torch.optim.AdamW(params)

    expected = run(theirs, theirs)
    for pair in ((ours, theirs), (theirs, ours)):
        for a, b in zip(run(*pair), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [ARSConfig(), ARSConfig(gate=("betas",))])
def test_a_controller_may_take_over_from_plain_adamw(config):
    """The products of the betas start from the powers of the steps already taken."""
    params, plain = parameters(shapes=((6,),)), parameters(shapes=((6,),))
    first = torch.optim.AdamW(plain)
    train(first, plain, 8)
    for param, value in zip(params, plain, strict=True):
        param.data.copy_(value.data)
    second = ARSAdamW(params, ars=config)
    second.load_state_dict(saved(first))
    result = train(second, params, 3, first=8)  # too little history to gate
    for a, b in zip(result, train(first, plain, 3, first=8), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


PLAIN = {"torch": torch.optim.AdamW, "ours": ARSAdamW}
BETAS = ARSConfig(gate=("betas",))  # which gates the betas, so that their products are not powers
TORCHS = {"step", "exp_avg", "exp_avg_sq"}
PRODUCTS = {"beta_products", "beta_products_step"}


@pytest.mark.parametrize("between", PLAIN.values(), ids=PLAIN.keys())
def test_products_do_not_outlive_steps_without_a_gate_on_the_betas(between):
    """Such an optimizer cannot advance them: they would be those of 4 steps after 40."""
    params = parameters(shapes=((5,),))
    first, second = ARSAdamW(params, ars=BETAS), between(params)
    third = ARSAdamW(params, ars=BETAS)
    train(first, params, 4)
    second.load_state_dict(saved(first))
    train(second, params, 36, first=4)
    assert set(saved(second)["state"][0]) >= TORCHS
    third.load_state_dict(saved(second))
    train(third, params, 1, first=40)
    state = third.state[params[0]]
    assert set(state) == TORCHS | PRODUCTS
    assert state["beta_products"].tolist() == pytest.approx([0.9**41, 0.999**41])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("config", [None, ARSConfig(), ARSConfig(gate=("lr", "grad"))])
def test_a_state_without_a_gate_on_the_betas_is_torchs(implementation, config):
    """Also where the products of an earlier version, or of another gate, come in a checkpoint."""
    params = parameters(shapes=((5,),))
    first, second = ARSAdamW(params, ars=BETAS), make(implementation, params, ars=config)
    train(second, params, 1)
    assert set(second.state[params[0]]) == TORCHS
    train(first, params, 2)
    old = saved(first)
    assert set(old["state"][0]) == TORCHS | PRODUCTS
    old["state"][0]["beta_products_step"] = 2  # as earlier versions saved it
    del old["controller"]
    second.load_state_dict(old)
    assert set(second.state[params[0]]) == TORCHS
    second.state[params[0]]["beta_products"] = torch.ones(2)  # as in an earlier version's pickle
    train(second, params, 1)
    assert set(second.state[params[0]]) == TORCHS


@pytest.mark.parametrize(("dtype", "is_kept"), [(torch.float32, True), (torch.bfloat16, False)])
def test_torch_may_hand_products_back_that_are_current_and_exact(dtype, is_kept):
    """It casts them to the parameter's dtype."""
    params = parameters(dtype, shapes=((5,),))
    first, second = ARSAdamW(params, ars=BETAS), torch.optim.AdamW(params)
    third = ARSAdamW(params, ars=BETAS)
    train(first, params, 3, loss=0.0)
    first.state[params[0]]["beta_products"].fill_(0.25)  # as no powers would be
    second.load_state_dict(saved(first))
    third.load_state_dict(saved(second))
    assert ("beta_products" in third.state[params[0]]) == is_kept
    train(third, params, 1, loss=0.0)
    expected = [0.9 * 0.25, 0.999 * 0.25] if is_kept else [0.9**4, 0.999**4]
    assert third.state[params[0]]["beta_products"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("step", [None, 3])
def test_products_of_earlier_versions_are_taken(step):
    """They saved no step beside them, or a number."""
    params = parameters(shapes=((5,),))
    first, second = ARSAdamW(params, ars=BETAS), ARSAdamW(params, ars=BETAS)
    train(first, params, 3, loss=0.0)
    first.state[params[0]]["beta_products"].fill_(0.25)
    older = saved(first)
    assert older["state"][0].pop("beta_products_step") == 3
    if step is not None:
        older["state"][0]["beta_products_step"] = step
    second.load_state_dict(older)
    assert second.state[params[0]]["beta_products"].tolist() == [0.25, 0.25]
    train(second, params, 1, loss=0.0)
    assert second.state[params[0]]["beta_products"].tolist() == [0.9 * 0.25, 0.999 * 0.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loading_keeps_the_moments_dtype(dtype):
    params = parameters(dtype)
    first = ARSAdamW(params, amsgrad=True, ars=BETAS)
    train(first, params, 2)
    second = ARSAdamW(params, amsgrad=True, ars=BETAS)
    second.load_state_dict(saved(first))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for param in params:
        state = second.state[param]
        assert {state[k].dtype for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")} == {wide}
        assert state["beta_products"].dtype == torch.float64
        assert state["step"].dtype == torch.float32
        for name, value in first.state[param].items():
            assert torch.equal(state[name], value)


def test_loading_a_plain_state_restarts_the_controller():
    params = parameters(shapes=((5,),))
    plain, gated = torch.optim.AdamW(params), ARSAdamW(params)
    train(plain, params, 1)
    train(gated, params, 4, loss=1.0)
    gated.load_state_dict(plain.state_dict())
    assert int(gated.controller.counts.sum()) == 0
    assert torch.count_nonzero(gated.controller.window) == 0
    train(gated, params, 1)  # and may watch something else


def test_a_parameter_without_a_saved_state_begins_anew():
    params = parameters(shapes=((5,), (2, 3)))
    optimizer = ARSAdamW(params)
    train(optimizer, params, 2, loss=1.0)
    state = optimizer.state_dict()
    del state["state"][1]
    optimizer.load_state_dict(state)
    train(optimizer, params, 1, loss=1.0)
    assert [int(optimizer.state[param]["step"]) for param in params] == [3, 1]


class Spring:
    """A penalty that fills buffers: 1/2 |theta|^2."""

    strength, mode = 1.0, "coupled"

    def __init__(self, params):
        self.params, self.buffers = params, [torch.zeros_like(param) for param in params]

    def terms(self):
        return []

    def gradients(self):
        return zip(self.params, self.buffers, strict=True)

    def refresh(self):
        for param, buffer in self.gradients():
            buffer.copy_(param)
        return sum(param.square().sum() / 2 for param in self.params)


@pytest.mark.parametrize("penalty", [Pull, Spring])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(clone, penalty):
    """pickle, unlike deepcopy, gives two tensors of one memory a memory each."""
    params = parameters(shapes=((5,), (2, 3)))
    optimizer = ARSAdamW(params, penalty=penalty(params), max_grad_norm=1.0)
    train(optimizer, params, 3)
    other = clone(optimizer)
    copies = other.param_groups[0]["params"]
    expected = train(optimizer, params, 3, first=3)
    assert all(map(torch.equal, train(other, copies, 3, first=3), expected))
    assert float(other.diagnostics["penalty"]) == float(optimizer.diagnostics["penalty"]) > 0


def test_added_group_is_trained():
    params = parameters(shapes=((5,), (3,)))
    optimizer = ARSAdamW(params[:1], ars=BETAS)
    train(optimizer, params, 2)
    optimizer.add_param_group({"params": params[1:], "lr": 0.5})
    before = params[1].detach().clone()
    train(optimizer, params, 1, first=2)
    assert float((params[1].detach() - before).abs().min()) > 0.1
    assert "beta_products" in optimizer.state[params[1]]


def test_the_class_decides_which_weight_decay_it_is():
    """A state of Adam's loads into AdamW's and stays decoupled, as in torch."""
    params = parameters(shapes=((5,),))
    adam, adamw = torch.optim.Adam(params), ARSAdamW(params)
    train(adam, params, 1)
    adamw.load_state_dict(saved(adam))
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True
