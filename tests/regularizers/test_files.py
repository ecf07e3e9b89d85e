"""Penalties in files: what comes back, what is refused, and what an interruption leaves."""

import importlib
import json
import os
import re
import sys
import zlib

import pytest
import torch
from ewc_models import move, random_importance, small_model

from ars.regularizers import (
    EWC,
    AdaptiveStrength,
    DiagonalFisher,
    KroneckerPenalty,
    ProgressiveInheritance,
    SubspacePenalty,
    load_penalty,
    save_penalty,
)


@pytest.fixture
def library():
    """The safetensors library: not at import, as the GPU tests may run without it."""
    return importlib.import_module("safetensors.torch")


def ewc(model, seed=1, **options):
    return EWC(model, random_importance(model, seed=seed), float(seed), **options)


def subspace(model, seed=1, rank=2):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(4, rank, generator=generator)).Q
    return SubspacePenalty(model, {"2.weight": basis}, float(seed))


def kronecker(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=generator)
    return KroneckerPenalty(model, {"2.weight": (root @ root.T, None)}, float(seed))


KINDS = {
    "ewc": ewc,
    "bfloat16": lambda model, seed=1: ewc(model, seed, storage="bfloat16"),
    "compact": lambda model, seed=1: ewc(model, seed, storage="compact"),
    "subspace": lambda model, seed=1: subspace(model, seed, rank=seed),
    "progressive": lambda model, seed=1: ProgressiveInheritance(
        ewc(model, seed), subspace(model, seed)
    ),
    "kronecker": kronecker,
}


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(build, dtype, tmp_path):
    model = small_model(dtype)
    saved = build(model)
    move(model)
    save_penalty(saved, tmp_path / "penalty.safetensors")
    assert os.listdir(tmp_path) == ["penalty.safetensors"]
    loaded = build(model, seed=2)
    load_penalty(loaded, str(tmp_path / "penalty.safetensors"))
    assert loaded.strength == 1.0
    assert loaded.value().item() == saved.value().item() > 0


def test_an_adaptive_strength_can_be_saved_too(tmp_path):
    model = small_model()
    first, second = (AdaptiveStrength(ewc(model, 3), total_steps=9) for _ in range(2))
    first.step()
    first.step()
    save_penalty(first, tmp_path / "strength.safetensors")
    load_penalty(second, tmp_path / "strength.safetensors")
    assert (second.steps, second.strength.item()) == (2, first.strength.item())


def test_metadata_records_names_shapes_and_estimator(tmp_path, library):
    model = small_model()
    fisher = DiagonalFisher(model, "exact").fit([(torch.randn(5, 3), torch.arange(5) % 2)])
    save_penalty(EWC(model, fisher), tmp_path / "ewc.safetensors")
    with library.safe_open(tmp_path / "ewc.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["kind"] == "EWC"
    state = json.loads(metadata["state"])
    assert state["estimator"] == "exact"
    assert state["importance"]["0.weight"]["shape"] == [4, 3]
    assert names == {
        f"{part}/{name}" for part in ("anchor", "importance") for name in fisher.importance
    }


def test_channels_last_weights_come_back_in_place(tmp_path):
    model = torch.nn.Conv2d(2, 3, 2, bias=False).to(memory_format=torch.channels_last)
    saved, loaded = (EWC(model, {"weight": torch.rand(3, 2, 2, 2)}) for _ in range(2))
    save_penalty(saved, tmp_path / "ewc.safetensors")
    load_penalty(loaded, tmp_path / "ewc.safetensors")
    assert torch.equal(loaded.importance["weight"], saved.importance["weight"])
    assert loaded.importance["weight"].stride() == model.weight.stride()


@pytest.fixture
def file(tmp_path):
    save_penalty(ewc(small_model()), tmp_path / "ewc.safetensors")
    return tmp_path / "ewc.safetensors"


def unchanged(penalty, before):
    return all(torch.equal(penalty.importance[n], t) for n, t in before.items())


def test_refuses_another_model_naming_the_first_difference(file):
    wider = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 5))
    penalty = ewc(wider)
    before = {n: t.clone() for n, t in penalty.importance.items()}
    with pytest.raises(ValueError, match=r"ewc\.safetensors: .*'2\.weight' has shape \(2, 4\)"):
        load_penalty(penalty, file)
    assert unchanged(penalty, before)
    deeper = torch.nn.Sequential(*wider, torch.nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"anchor lacks '3\.weight', which this penalty holds"):
        load_penalty(ewc(deeper), file)
    with pytest.raises(ValueError, match=r"anchor has '2\.weight', which this penalty does not"):
        load_penalty(ewc(torch.nn.Sequential(torch.nn.Linear(3, 4))), file)


def test_refuses_another_kind(file):
    with pytest.raises(ValueError, match="holds the state of EWC, not of SubspacePenalty"):
        load_penalty(subspace(small_model()), file)
    with pytest.raises(ValueError, match="has storage='full', this penalty 'compact'"):
        load_penalty(ewc(small_model(), storage="compact"), file)
    with pytest.raises(TypeError, match="dict has no state_dict"):
        load_penalty({}, file)
    with pytest.raises(TypeError, match="dict has no state_dict"):
        save_penalty({}, file)


def test_refuses_what_it_has_not_written(tmp_path, library):
    penalty = ewc(small_model())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_penalty(penalty, tmp_path / "absent")
    library.save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a file of save_penalty: its format is None"):
        load_penalty(penalty, tmp_path / "other")
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_penalty(penalty, tmp_path / "text")


def test_refuses_a_damaged_file_before_changing_anything(file, library):
    penalty = ewc(small_model(), seed=5)
    before = {n: t.clone() for n, t in penalty.importance.items()}
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_penalty(penalty, file)
    flipped = bytearray(content)
    flipped[-1] ^= 1  # one bit of a weight: safetensors itself would not notice
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"the file is damaged: '.*' is not what was saved"):
        load_penalty(penalty, file)
    with library.safe_open(file, framework="pt") as opened:
        metadata, names = opened.metadata(), list(opened.keys())
        tensors = {name: opened.get_tensor(name) for name in names[1:]}
    library.save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=f"damaged: it lacks '{re.escape(names[0])}'"):
        load_penalty(penalty, file)
    assert unchanged(penalty, before)


def test_a_save_that_fails_leaves_the_old_file(file, monkeypatch):
    content = file.read_bytes()

    def fails(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        save_penalty(ewc(small_model(), seed=2), file)
    assert file.read_bytes() == content
    assert os.listdir(file.parent) == [file.name]


def test_a_state_that_json_cannot_hold_is_refused(tmp_path):
    class Odd:
        def state_dict(self):
            return {"part": {"when": object()}}

        def load_state_dict(self, state):
            raise AssertionError

    with pytest.raises(TypeError, match="'part/when' of the state has type object: no tensor"):
        save_penalty(Odd(), tmp_path / "odd")
    assert not os.listdir(tmp_path)


def test_says_how_to_get_the_library(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'ars-triton\[safetensors\]'"):
        load_penalty(ewc(small_model()), file)


def test_every_flipped_bit_is_refused_and_changes_nothing(tmp_path):
    model = torch.nn.Linear(2, 1)
    path = tmp_path / "ewc.safetensors"
    save_penalty(ewc(model), path)
    whole = path.read_bytes()
    penalty = ewc(model, seed=2)
    before = snapshot(penalty)
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_penalty(penalty, path)
    assert snapshot(penalty) == before


def snapshot(penalty):
    """Everything in a state as text."""
    return repr(penalty.state_dict())


def written(path, library, state, tensors):
    """A file as save_penalty writes it, around a record that it would not write."""
    record = state if isinstance(state, str) else json.dumps(state)
    checksum = str(zlib.crc32(record.encode()))
    metadata = {"format": "ars-triton penalty 1", "kind": "EWC", "state": record, "crc32": checksum}
    library.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[" * 20_000 + "]" * 20_000,
        '{"a": ' * 20_000 + "1" + "}" * 20_000,
        f'{{"strength": {"9" * 5_000}}}',
        '{"strength": 1e400}',
        "[]",
        "3",
        "{}",
        '{"anchor": {"tensor": "x"}}',
        '{"anchor": {"tensor": "anchor/0.weight"}}',
        '{"anchor": 3, "importance": "x"}',
    ],
    ids=lambda record: record[:12],
)
def test_a_record_that_is_no_state(tmp_path, library, record):
    penalty = ewc(small_model())
    before = {name: value.clone() for name, value in penalty.importance.items()}
    path = tmp_path / "x.safetensors"
    written(path, library, record, {"anchor/0.weight": torch.zeros(1)})
    with pytest.raises((TypeError, ValueError), match=r"x.safetensors: ") as refused:
        load_penalty(penalty, path)
    assert len(str(refused.value)) < 500 + len(str(path))
    assert unchanged(penalty, before)


def test_no_part_of_a_record_is_taken_for_another(file, tmp_path, library):
    """Every entry removed, and every one replaced by a text."""
    with importlib.import_module("safetensors").safe_open(file, framework="pt") as whole:
        state = json.loads(whole.metadata()["state"])
        tensors = {name: whole.get_tensor(name) for name in whole.keys()}  # noqa: SIM118

    def places(value, place=()):
        for key, part in value.items() if isinstance(value, dict) else ():
            yield (*place, key)
            yield from places(part, (*place, key))

    def changed(place, change):
        copied = json.loads(json.dumps(state))
        parent = copied
        for key in place[:-1]:
            parent = parent[key]
        change(parent, place[-1])
        return copied

    penalty = ewc(small_model())
    for place in places(state):
        if place[0] == "estimator":  # any word says where the importance comes from
            continue
        for change in (dict.pop, lambda parent, key: parent.__setitem__(key, "x")):
            written(tmp_path / "x", library, changed(place, change), tensors)
            with pytest.raises((TypeError, ValueError), match="x: "):
                load_penalty(penalty, tmp_path / "x")
