"""A diagonal Fisher in a file: what comes back, and what is refused before anything has changed."""

import importlib
import json
import os
import re
import zlib

import pytest
import torch
from torch import nn

from ars.regularizers import EWC, DiagonalFisher, KroneckerFisher, load_penalty, save_penalty

BATCH = torch.randn(6, 4), torch.arange(6) % 3


def network(width=5):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def fitted(model, estimator="exact", **options):
    return DiagonalFisher(model, estimator, **options).fit([BATCH])


def compiled(model):
    return torch.compile(model, backend="eager")


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[n], e) and found[n].dtype == e.dtype for n, e in expected.items())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_round_trip(dtype, precision, tmp_path):
    model = network().to(precision)
    fisher = DiagonalFisher(model, "sketch", draws=2, dtype=dtype)
    fisher.fit([(BATCH[0].to(precision), BATCH[1])])
    save_penalty(fisher, tmp_path / "fisher.safetensors")
    assert os.listdir(tmp_path) == ["fisher.safetensors"]
    loaded = DiagonalFisher(model)
    load_penalty(loaded, tmp_path / "fisher.safetensors")
    assert same(loaded.importance, fisher.importance)
    for what in ("estimator", "unit", "draws", "n_samples", "dtype"):
        assert getattr(loaded, what) == getattr(fisher, what), what
    assert loaded.n_samples == 6
    value = EWC(model, loaded).importance
    assert same(value, EWC(model, fisher).importance)
    loaded.importance["0.weight"].zero_()
    again = DiagonalFisher(model)
    again.load_state_dict(fisher.state_dict())
    again.importance["0.weight"].zero_()  # a copy
    assert fisher.importance["0.weight"].any()


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_names_are_those_of_the_model_inside(wrap, tmp_path):
    model = network()
    save_penalty(fitted(wrap(model)), tmp_path / "fisher")
    loaded = DiagonalFisher(model)
    load_penalty(loaded, tmp_path / "fisher")
    assert same(loaded.importance, fitted(model).importance)
    load_penalty(DiagonalFisher(wrap(model)), tmp_path / "fisher")


def test_what_has_not_been_measured_is_not_saved(tmp_path):
    with pytest.raises(RuntimeError, match="not fitted"):
        save_penalty(DiagonalFisher(network()), tmp_path / "fisher")
    with pytest.raises(TypeError, match="save the penalty that is made of it"):
        save_penalty(KroneckerFisher(network()).fit([BATCH]), tmp_path / "fisher")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: network(7), r"'0\.weight' has shape \(5, 4\), the parameter \(7, 4\)"),
        (lambda: nn.Sequential(*network(), nn.Linear(3, 3)), r"lacks '3\.weight', which is train"),
        (lambda: nn.Sequential(*network()[:2]), r"has '2\.weight', which Sequential does not have"),
    ],
)
def test_a_file_of_another_model_is_refused(build, match, tmp_path):
    save_penalty(fitted(network()), tmp_path / "fisher")
    other = DiagonalFisher(build())
    with pytest.raises(ValueError, match=match):
        load_penalty(other, tmp_path / "fisher")
    assert other.n_samples == 0
    with pytest.raises(ValueError, match="holds the state of DiagonalFisher, not of EWC"):
        load_penalty(EWC(network(), fitted(network())), tmp_path / "fisher")


def test_a_frozen_parameter_may_lack_or_be_there(tmp_path):
    model = network()
    save_penalty(fitted(model), tmp_path / "whole")
    model[0].requires_grad_(False)
    save_penalty(fitted(model), tmp_path / "part")
    for name, size in (("whole", 4), ("part", 2)):
        loaded = DiagonalFisher(model)
        load_penalty(loaded, tmp_path / name)
        assert len(loaded.importance) == size


def test_every_flipped_bit_is_refused_and_changes_nothing(tmp_path):
    model = nn.Linear(2, 1)
    fisher = DiagonalFisher(model, "empirical").fit(
        [torch.ones(3, 2)], loss_fn=lambda model, x: model(x)[:, 0]
    )
    path = tmp_path / "fisher"
    save_penalty(fisher, path)
    whole = path.read_bytes()
    loaded = DiagonalFisher(model, "exact")
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_penalty(loaded, path)
    assert (loaded.estimator, loaded.n_samples) == ("exact", 0)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="damaged"):
        load_penalty(loaded, path)


def test_no_part_of_a_state_is_taken_for_another(tmp_path):
    model = network()
    state = fitted(model).state_dict()
    loaded = DiagonalFisher(model, "mc")
    tensors = state["importance"]
    wrong = [{key: value for key, value in state.items() if key != left} for left in state]
    for key, expected in state.items():
        others = ("x", -1, None, {"0.weight": 1})
        wrong += [{**state, key: other} for other in others if other != expected]
    for name, tensor in tensors.items():
        for other in (-tensor - 1, tensor * torch.nan, tensor.half(), tensor[..., :1]):
            wrong.append({**state, "importance": {**tensors, name: other}})
    for each in [*wrong, None, 3, {**state, "more": 1}]:
        with pytest.raises((TypeError, ValueError)):
            loaded.load_state_dict(each)
    assert (loaded.estimator, loaded.n_samples) == ("mc", 0)


def test_a_record_with_a_right_checksum_is_read_with_care(tmp_path):
    library = importlib.import_module("safetensors.torch")
    record = json.dumps({"importance": {}})
    metadata = {"format": "ars-triton penalty 1", "kind": "DiagonalFisher", "state": record,
                "crc32": str(zlib.crc32(record.encode()))}  # fmt: skip
    library.save_file({}, tmp_path / "fisher", metadata)
    with pytest.raises(ValueError, match="has the entries"):
        load_penalty(DiagonalFisher(network()), tmp_path / "fisher")
