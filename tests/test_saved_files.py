"""Files that version 0.1.0 wrote are read, and training goes on from them as it did then."""

import json
import lzma
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars import ARSAdam, ARSAdamW, ARSConfig, ARSOptimizer
from ars.regularizers import (
    EWC,
    KroneckerFactors,
    KroneckerPenalty,
    SubspacePenalty,
    dequantize,
    load_penalty,
)
from common.errors import UsageError
from common.output_folder import OutputFolder
from common.program import StopRequest
from trainer.arguments import parse_arguments
from trainer.series_run import prepare

SAVED = Path(__file__).parent / "saved"

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "default": lambda params: ARSAdamW(params, lr=1e-2),
    "paper": lambda params: ARSAdamW(params, lr=1e-2, ars=ARSConfig.paper(), amsgrad=True),
    "plain": lambda params: ARSAdamW(params, lr=1e-2, ars=None),
    "adam": lambda params: ARSAdam(params, lr=1e-2),
    "wrapper": lambda params: ARSOptimizer(
        torch.optim.SGD(params, lr=1e-2, momentum=0.9), ARSConfig(gate=("lr",))
    ),
    "master": lambda params: ARSAdamW(params, lr=1e-2, master_weights=True),
}


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def _train(model: nn.Module, opt: Any, steps: range) -> None:
    """As the saved runs were trained."""
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(3, (40,), generator=torch.Generator().manual_seed(2))
    dtype = next(model.parameters()).dtype
    for step in steps:
        rows = slice(step % 10 * 4, step % 10 * 4 + 4)
        opt.zero_grad()
        logits = model(inputs[rows].to(dtype)).float()
        loss = nn.functional.cross_entropy(logits, targets[rows])
        loss.backward()
        opt.step(loss=loss)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_goes_on(kind: str) -> None:
    saved = torch.load(SAVED / "optimizers.pt", weights_only=True)[kind]
    model = _model()
    if kind == "master":
        model = model.bfloat16()
    model.load_state_dict(saved["model"])
    opt = OPTIMIZERS[kind](model.parameters())
    opt.load_state_dict(saved["optimizer"])
    _train(model, opt, range(7, 12))
    for name, value in model.state_dict().items():
        # The order of sums differs between processors, and a bfloat16 may then round the other way.
        rtol, atol = (1e-2, 1e-5) if kind == "master" else (1e-4, 1e-6)
        torch.testing.assert_close(value, saved["model_after_5"][name], rtol=rtol, atol=atol)


def test_pickled_optimizers_go_on() -> None:
    saved = pickle.loads(lzma.decompress((SAVED / "optimizers.pickle.xz").read_bytes()))
    for kind, (pickled, after_5) in saved.items():
        model, opt = pickle.loads(pickled)
        _train(model, opt, range(7, 12))
        rtol, atol = (1e-2, 1e-5) if kind == "master" else (1e-4, 1e-6)  # as above
        for param, expected in zip(model.parameters(), after_5, strict=True):
            torch.testing.assert_close(param.detach(), expected, rtol=rtol, atol=atol)


def _zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def _factors(model: nn.Sequential) -> dict[str, KroneckerFactors]:
    return {
        f"{name}.weight": KroneckerFactors(
            torch.eye(layer.in_features + 1), torch.eye(layer.out_features)
        )
        for name, layer in model.named_children()
        if isinstance(layer, nn.Linear)
    }


PENALTIES: dict[str, Callable[[Any], Any]] = {
    "ewc": lambda model: EWC(model, _zeros(model)),
    "ewc_compact": lambda model: EWC(model, _zeros(model), storage="compact"),
    "kronecker": lambda model: KroneckerPenalty(model, _factors(model)),
    "subspace": lambda model: SubspacePenalty(model, {"0.weight": torch.eye(6)[:, :2]}),
}


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.filterwarnings("ignore:the importance has collapsed")  # zeros, to be replaced
def test_penalty_has_its_value(kind: str) -> None:
    model = _model()
    model.load_state_dict(torch.load(SAVED / "penalised_model.pt", weights_only=True)["model"])
    penalty = PENALTIES[kind](model)
    load_penalty(penalty, SAVED / f"{kind}.safetensors")
    with torch.no_grad():
        for param in model.parameters():
            param += 0.5
    expected = json.loads((SAVED / "penalty_values.json").read_text())[kind]
    assert float(penalty.value().detach()) == pytest.approx(expected, rel=1e-5)


def test_pickled_penalties_and_fishers_are_read() -> None:
    objects, values = pickle.loads(lzma.decompress((SAVED / "objects.pickle.xz").read_bytes()))
    assert {name: float(objects[name].value().detach()) for name in values} == pytest.approx(values)
    importance = objects["diagonal"].importance
    for name, stored in objects["quantized"].items():
        assert torch.equal(dequantize(*stored), importance[name])
    for name, factors in objects["factors"].items():
        assert torch.equal(factors.inputs, objects["kronecker"].factors[name].inputs)
    assert objects["covariance"].covariance["0.weight"].shape == (4, 4)
    objects["adaptive"].step()
    assert float(objects["combined"](torch.ones(())).detach()) > 1.0
    growth = objects["growth"]
    grown = growth.importance({n: torch.ones_like(p) for n, p in growth.parent.named_parameters()})
    assert grown.keys() == dict(growth.model.named_parameters()).keys()


def test_an_interrupted_run_of_an_earlier_version_is_refused_and_left_alone(
    tmp_path: Path,
) -> None:
    # It has other settings: budgets were shared out over the lineage of a model.
    out = tmp_path / "saved"
    shutil.copytree(SAVED / "run", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    options = parse_arguments(["--depths", "1", "--arms", "scratch+ars", "--out", str(out)])
    with OutputFolder(out) as output, pytest.raises(UsageError, match="earlier version"):
        prepare(options, StopRequest(), output)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
