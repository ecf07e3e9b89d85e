"""What is easily passed for something else: each error names it and says what to do instead."""

import copy
import os
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    ActivationCovariance,
    AdaptiveStrength,
    CombinedLoss,
    DiagonalFisher,
    Distillation,
    KroneckerFisher,
    KroneckerPenalty,
    ProgressiveInheritance,
    SubspacePenalty,
    load_penalty,
    quantize,
    save_penalty,
)

FISHERS = (DiagonalFisher, KroneckerFisher, ActivationCovariance)
DATA = [(torch.linspace(-1, 1, 18).view(6, 3), torch.arange(6) % 2)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def ones(model):
    return {n: torch.ones_like(p) for n, p in model.named_parameters()}


def penalties(model):
    inputs, targets = DATA[0]
    factors = KroneckerFisher(model).fit([(inputs.to(model[0].weight.dtype), targets)])
    subspace = SubspacePenalty(model, dict.fromkeys(["0.weight", "2.weight"], torch.tensor([1])))
    return {
        "ewc": EWC(model, ones(model)),
        "kronecker": KroneckerPenalty(model, factors),
        "subspace": subspace,
        "progressive": ProgressiveInheritance(EWC(model, ones(model)), subspace),
    }


ONE = r"an optimizer takes one penalty\. .*CombinedLoss.* ProgressiveInheritance"
PASSED = {
    "a list": (lambda m: list(penalties(m).values()), f"penalty list has no 'strength': {ONE}"),
    "a tuple": (lambda m: (EWC(m, ones(m)),), f"penalty tuple has no 'strength': {ONE}"),
    "a Fisher": (lambda m: DiagonalFisher(m).fit(DATA), r"DiagonalFisher .*: pass EWC\(model, "),
    "importances": (ones, r"penalty dict has no 'strength': pass EWC\(model, \.\.\.\) of this"),
    "factors": (lambda m: KroneckerFisher(m).fit(DATA), r": pass KroneckerPenalty\(model, "),
    "activations": (ActivationCovariance, r": pass KroneckerPenalty\(model, "),
    "the class": (lambda m: EWC, r"penalty EWC .* the class, so build one: EWC\("),
    "a distillation": (Distillation, "cannot apply it, so add it to the loss"),
    "a loss": (lambda m: CombinedLoss(EWC(m, ones(m))), "cannot apply it, so add it to the loss"),
    "a function": (lambda m: cross_entropy, "a loss is no penalty"),
    "a model": (lambda m: m, "Sequential has no 'strength': a loss is no penalty"),
    "an adaptive strength": (
        lambda m: AdaptiveStrength(EWC(m, ones(m)), total_steps=3),
        r"pass the penalty that it adapts, its \.penalty",
    ),
    "a number": (lambda m: 3.0, r"penalty float has no 'strength': see ars\.penalty\.Penalty"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "says"), PASSED.values(), ids=PASSED)
def test_what_is_no_penalty_of_an_optimizer(make, says):
    model = network()
    wrong = make(model)
    with pytest.raises(TypeError, match=says):
        ARSAdamW(model.parameters(), penalty=wrong)
    optimizer = ARSAdamW(model.parameters())
    with pytest.raises(TypeError, match=says):
        optimizer.penalty = wrong
    assert optimizer.penalty is None


@pytest.mark.parametrize("kind", ["ewc", "kronecker", "subspace", "progressive"])
def test_a_layer_that_was_frozen_is_left_out_and_pulled_again_once_it_is_thawed(kind):
    """Of what is optimized the step is as if the loss had the penalty."""
    model = network()
    penalty = penalties(model)[kind]
    penalty.strength = 0.3
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2
    model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": 0.05, "weight_decay": 0.1}
    optimizer = ARSAdamW(trained, penalty=penalty, ars=None, **options)
    twin, added = copy.deepcopy((model, penalty))
    reference = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **options)

    def step():
        optimizer.zero_grad()
        reference.zero_grad()
        cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
        (cross_entropy(twin(DATA[0][0]), DATA[0][1]) + added.value()).backward()
        optimizer.step()
        reference.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    before = [p.detach().clone() for p in model[0].parameters()]
    for _ in range(3):
        step()
    assert all(map(torch.equal, before, model[0].parameters()))
    model[0].requires_grad_(True)
    twin[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    reference.add_param_group({"params": list(twin[0].parameters())})
    for _ in range(3):
        step()
    assert float(optimizer.diagnostics["penalty"]) > 0


@pytest.mark.parametrize("kind", ["ewc", "kronecker", "subspace", "progressive"])
def test_what_the_optimizer_lacks_is_named(kind):
    model = network()
    penalty = penalties(model)[kind]
    with pytest.raises(ValueError, match=r"pulls at '0\.weight' and belongs .* not from a copy"):
        ARSAdamW(copy.deepcopy(model).parameters(), penalty=penalty)
    frozen = copy.deepcopy(model).requires_grad_(False)  # as a teacher is kept
    with pytest.raises(ValueError, match=r"pulls at '0\.weight' and belongs .* not from a copy"):
        ARSAdamW(model.parameters(), penalty=penalties_of_frozen(frozen, kind))
    if kind != "subspace":  # which has this one only
        with pytest.raises(
            ValueError, match=r"'0\.weight', which is no .* \(add_param_group\), le"
        ):
            ARSAdamW([model[0].bias, *model[2].parameters()], penalty=penalty)


def penalties_of_frozen(model, kind):
    factors = {"0.weight": (torch.eye(3), torch.eye(4))}
    subspace = SubspacePenalty(model, {"0.weight": torch.tensor([1])})
    made = {"ewc": EWC(model, ones(model)), "kronecker": KroneckerPenalty(model, factors)}
    made |= {"subspace": subspace}
    return made.get(kind) or ProgressiveInheritance(made["ewc"], subspace)


@pytest.mark.parametrize("kind", ["kronecker", "subspace", "progressive"])
def test_a_model_that_was_converted_since_is_said(kind):
    model = network()
    penalty = penalties(model)[kind]
    optimizer = ARSAdamW(model.parameters(), penalty=penalty)
    old = {n: t.clone() for n, t in model.state_dict().items()}
    model.double()
    says = r"'0\.weight' is of torch\.float64, and what the penalty keeps .* of torch\.float32; mo"
    for call in (penalty.value, penalty.refresh, lambda: CombinedLoss(penalty)(torch.tensor(1.0))):
        with pytest.raises(ValueError, match=says):
            call()
    says = r"the penalty's pull of .* torch\.float64 .* convert the model first, then build"
    with pytest.raises(ValueError, match=says):
        ARSAdamW(model.parameters(), penalty=penalty)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises((ValueError, RuntimeError), match=r"float64|float32"):
        optimizer.step(loss=torch.tensor(1.0))
    assert all(torch.equal(model.state_dict()[n].float(), t) for n, t in old.items())
    again = penalties(model)[kind]
    again.load_state_dict(penalty.state_dict())  # as the message says
    assert again.value().item() == 0.0


@pytest.mark.parametrize("kind", ["ewc", "kronecker", "subspace"])
def test_a_parameter_that_was_cut_since_is_said(kind):
    model = network()
    penalty = penalties(model)[kind]
    weight = model[0].weight
    weight.data = weight.data[:1]
    with pytest.raises(ValueError, match=r"'0\.weight' is \(1, 3\) on .*, and what the penalty k"):
        penalty.value()


@pytest.mark.parametrize("make", FISHERS)
@pytest.mark.parametrize(
    "wrong", [lambda m: m.parameters(), lambda m: m.state_dict(), lambda m: cross_entropy]
)
def test_what_is_no_model(make, wrong):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got .*; pass the mod"):
        make(wrong(network()))
    with pytest.raises(TypeError, match="got the class Linear"):
        make(nn.Linear)
    with pytest.raises(TypeError, match=r"teacher must be a torch\.nn\.Module"):
        Distillation(wrong(network()))


@pytest.mark.parametrize("make", FISHERS)
def test_what_are_no_batches(make):
    measure = make(network())
    for wrong in (None, cross_entropy, DATA[0][0], network()[0]):
        with pytest.raises(
            TypeError, match=r"batches must be an iterable of pairs .* \[\(inputs, t"
        ):
            measure.fit(wrong)
    with pytest.raises(TypeError, match=r"\[\(inputs, targets\)\]"):
        measure.fit(DATA[0])  # one batch, not a list of them
    with pytest.raises(
        ValueError, match=r"n_samples .* got cross_entropy; pass a loss by its name"
    ):
        measure.fit(DATA, cross_entropy)
    with pytest.raises(TypeError, match=r"must be int64, the numbers of classes, got torch.fl"):
        measure.fit([(DATA[0][0], torch.eye(2)[DATA[0][1]])])


@pytest.mark.parametrize("make", [DiagonalFisher, KroneckerFisher])
def test_inference_mode_is_named(make):
    model = network()
    with torch.inference_mode():
        batches, inside = [(torch.ones(6, 3), DATA[0][1].clone())], network()
        with pytest.raises(RuntimeError, match=r"fit is not possible inside torch\.inference_mode"):
            make(model).fit(DATA)
    with pytest.raises(
        ValueError, match=r"inputs of batch 0 were made inside torch\.inference_mod"
    ):
        make(model).fit(batches)
    with pytest.raises(ValueError, match=r"'0\.weight' was made inside torch\.inference_mode\(\)"):
        make(inside).fit(DATA)
    with torch.no_grad():
        assert make(model).fit(DATA).n_samples == 6


def test_penalties_are_not_built_in_inference_mode():
    model = network()
    factors = KroneckerFisher(model).fit(DATA)
    with torch.inference_mode():
        for build in (
            lambda: EWC(model, ones(model)),
            lambda: KroneckerPenalty(model, factors),
            lambda: SubspacePenalty(model, {"0.weight": torch.tensor([1])}),
        ):
            with pytest.raises(RuntimeError, match="building a penalty is not possible inside"):
                build()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
def test_activations_may_be_measured_in_inference_mode(mode):
    model = network()
    with mode():
        measured = ActivationCovariance(model).fit(DATA)
    penalty = KroneckerPenalty(model, measured)
    penalty.consolidate(measured.merge(measured))
    expected = ActivationCovariance(model).fit(DATA)
    for name, moment in measured.covariance.items():
        assert torch.equal(moment, expected.covariance[name])
        assert not moment.is_inference()


@pytest.mark.parametrize("make", [DiagonalFisher, KroneckerFisher])
def test_a_frozen_model_is_said_to_be(make):
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad=True; call requires_gra"):
        make(frozen).fit(DATA)


OTHER = nn.Sequential(nn.Linear(5, 2))


@pytest.mark.parametrize(
    ("fisher", "error", "says"),
    [
        (lambda m: m, TypeError, r"got Sequential; fit one: DiagonalFisher\(model\)\.fit"),
        (lambda m: DATA, TypeError, r"got list; fit one: DiagonalFisher"),
        (lambda m: KroneckerFisher(m), TypeError, "got KroneckerFisher; a KroneckerPenalty takes"),
        (lambda m: ActivationCovariance(m), TypeError, "a KroneckerPenalty takes that"),
        (lambda m: ones(OTHER), ValueError, r"'0\.weight' has shape \(2, 5\), .* on this model"),
        (lambda m: {n: quantize(t) for n, t in ones(m).items()}, TypeError, r"dequantize\("),
        (lambda m: {n: t.numpy() for n, t in ones(m).items()}, TypeError, "from_numpy"),
        (
            lambda m: {f"net.module.{n}": t for n, t in ones(m).items()},
            ValueError,
            "one and the same",
        ),
        (lambda m: {f"module.{n}.old": t for n, t in ones(m).items()}, ValueError, "_orig_mod of"),
    ],
)
def test_what_is_no_fisher_of_the_model(fisher, error, says):
    model = network()
    wrong = fisher(model)
    with pytest.raises(error, match=says):
        EWC(model, wrong)
    penalty = EWC(model, ones(model))
    for further in (penalty.add_task, penalty.consolidate):
        with pytest.raises(error, match=says):
            further(wrong)


def test_a_fisher_of_the_module_inside_of_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = network()

    with pytest.raises(ValueError, match=r"fisher names '0\.weight', .* one and the same module"):
        EWC(Wrapper(), ones(network()))


def test_what_is_no_factors_or_bases():
    model = network()
    for wrong, says in (
        (DiagonalFisher(model).fit(DATA), "got DiagonalFisher; an EWC takes that"),
        (model, "got Sequential; fit one of the two"),
        (model.state_dict(), r"factors of '0\.weight' must be a pair \(A, G\), got Tensor"),
    ):
        with pytest.raises(TypeError, match=says):
            KroneckerPenalty(model, wrong)
    with pytest.raises(TypeError, match="got ActivationCovariance; from_activations takes that"):
        SubspacePenalty(model, ActivationCovariance(model).fit(DATA))


def test_what_is_no_penalty_of_a_loss_or_a_strength():
    model = network()
    fisher, penalty = DiagonalFisher(model).fit(DATA), EWC(model, ones(model))
    for wrong, says in (
        ([penalty], "pass them one by one"),
        (fisher, r"pass EWC\(model, \.\.\.\) of this DiagonalFisher"),
        (EWC, r"that is the class, so build one: EWC\("),
    ):
        with pytest.raises(TypeError, match=says):
            CombinedLoss(wrong)
        with pytest.raises(TypeError, match=says.replace("pass them one by one", "one for each")):
            AdaptiveStrength(wrong, total_steps=3)
    with pytest.raises(ValueError, match=r"got float; pass the loss itself, not its .item"):
        CombinedLoss(penalty)(1.0)
    with pytest.raises(TypeError, match="got generator; pass the module itself"):
        CombinedLoss(l2=0.1, model=model.parameters())


def test_what_is_no_penalty_of_a_file(tmp_path):
    pytest.importorskip("safetensors")
    model, path = network(), tmp_path / "file"
    optimizer = torch.optim.Adam(model.parameters())
    for wrong, says in (
        (model, r"Sequential is no penalty: torch\.save its state_dict"),
        (optimizer, "Adam is no penalty"),
        (KroneckerFisher(model), "KroneckerFisher has no .*; save the penalty that is made of it"),
        (EWC, "EWC is the class: build a penalty of it first"),
        (str(path), "the penalty comes first, then the path"),
    ):
        with pytest.raises(TypeError, match=says):
            save_penalty(wrong, path)
        with pytest.raises(TypeError, match=says):
            load_penalty(wrong, path)
    assert not path.exists()
    os.mkfifo(path)
    for place in (path, tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="is no regular file"):
            load_penalty(EWC(model, ones(model)), place)
