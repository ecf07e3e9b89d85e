"""Parameter groups: given twice, added later, elsewhere."""

import pytest
import torch
from optimizers import Pull, gradients, parameters

from ars import ARSAdamW

SHAPES = ((5,), (3,))


@pytest.mark.parametrize("later", [False, True])
def test_a_parameter_given_twice_is_named(later):
    a, b = parameters(shapes=SHAPES)
    lists = (
        ([a, b, a], "parameter 2 is the same tensor as parameter 0"),
        (iter([a, a]), "parameter 1 is the same tensor as parameter 0"),
        ([("first", a), ("second", a)], "second is the same tensor as parameter 0"),
    )
    for params, match in lists:
        if later and match.startswith("second"):
            optimizer = ARSAdamW([("other", b)])
        else:
            optimizer = ARSAdamW([torch.ones(2, requires_grad=True)])
        make = optimizer.add_param_group if later else lambda group: ARSAdamW([group])
        with pytest.raises(ValueError, match=match):
            make({"params": params})
        assert len(optimizer.param_groups) == 1


def test_a_parameter_in_two_groups():
    a, b = parameters(shapes=SHAPES)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        ARSAdamW([{"params": [a, b]}, {"params": [a]}])
    optimizer = ARSAdamW([a])
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": [a]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("params", [iter, tuple, list])
def test_groups_may_be_any_sequence(params):
    values = parameters(shapes=SHAPES)
    optimizer = ARSAdamW(params(values[:1]))
    optimizer.add_param_group({"params": params(values[1:])})
    optimizer.add_param_group({"params": torch.ones(2, requires_grad=True)})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]
    assert [group["penalty_strength"] for group in optimizer.param_groups] == [None] * 3


def test_a_group_elsewhere_is_refused_whole():
    a, _ = parameters(shapes=SHAPES)
    optimizer = ARSAdamW([a], foreach=True)
    with pytest.raises(RuntimeError, match="requires all the params to be on the CPU"):
        optimizer.add_param_group({"params": torch.empty(3, device="meta", requires_grad=True)})
    assert len(optimizer.param_groups) == 1
    gradients([a], 0)
    optimizer.step()


def test_a_penalty_may_be_set_for_a_group_that_is_added_later():
    params = parameters(shapes=SHAPES)
    optimizer = ARSAdamW(params[:1])
    with pytest.raises(ValueError, match="which is no parameter of this optimizer"):
        optimizer.penalty = Pull(params)
    optimizer.add_param_group({"params": params[1:], "penalty_strength": 2.0})
    optimizer.penalty = Pull(params)
    gradients(params, 0)
    optimizer.step()
    assert float(optimizer.diagnostics["penalty"]) > 0


@pytest.mark.parametrize(
    ("group", "error", "match"),
    [
        ([torch.ones(1)], TypeError, "param_group must be a dict, but got <class 'list'>"),
        ({"params": torch.ones(1), "penalty_strength": -1.0}, ValueError, "finite and >= 0"),
        ({"params": torch.ones(1), "penalty_strength": "1"}, TypeError, "a number or a 0-d tensor"),
    ],
)
def test_a_bad_group_is_refused_when_it_is_added(group, error, match):
    optimizer = ARSAdamW(parameters(shapes=SHAPES))
    with pytest.raises(error, match=match):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_a_state_of_torchs_leaves_the_strength_of_groups():
    params = parameters(shapes=SHAPES)
    groups = [{"params": params[:1], "penalty_strength": 7.0}, {"params": params[1:]}]
    ours = ARSAdamW(groups, penalty=Pull(params))
    theirs = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    ours.load_state_dict(theirs.state_dict())
    assert [group["penalty_strength"] for group in ours.param_groups] == [7.0, None]


def test_a_state_of_torchs_has_no_strength_of_groups():
    params = parameters(shapes=SHAPES)
    theirs, ours = torch.optim.AdamW(params), ARSAdamW(params, penalty=Pull(params))
    gradients(params, 0)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    assert ours.param_groups[0]["penalty_strength"] is None
