"""The digits' protocol: data, training, figures, and that the methods do what they are said to."""

import itertools
from typing import Any

import pytest
import torch

from common.program import StopRequest
from continual import memory_methods
from continual.digit_tasks import Run, Settings, load, run_tasks, tasks_of
from continual.digits_results import average_accuracy, forgetting, markdown_table
from continual.memory_methods import METHODS

SEEDS = itertools.count()


def train(method: str, *, tasks: int = 2, epochs: int = 2, strength: float | None = None) -> Any:
    strength = METHODS[method].strength if strength is None else strength
    torch.manual_seed(next(SEEDS))  # nothing may depend on the global state
    record = run_tasks(
        Run(method, strength, tasks, seed=0), StopRequest(), Settings(epochs=epochs), load()
    )
    record.pop("cpu_seconds")
    return record


def test_images_are_split_once_and_for_all() -> None:
    digits, tuning = load(), load(validation=True)
    assert digits.train_images.shape == (1437, 64)
    assert digits.test_images.shape == (360, 64)
    assert digits.test_labels.bincount().min() >= 35  # stratified
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 1)
    rows = {tuple(row) for row in digits.train_images.tolist()}
    assert len(rows) == 1437
    assert tuning.train_images.shape == (1077, 64)
    parts = [{tuple(row) for row in t.tolist()} for t in (tuning.train_images, tuning.test_images)]
    assert parts[0] | parts[1] == rows
    assert not parts[0] & parts[1]
    assert not rows & {tuple(row) for row in digits.test_images.tolist()}


def test_permutations() -> None:
    digits = load()
    orders = tasks_of(digits, 4, 3, by_class=False)
    assert torch.equal(orders[0].train_images, digits.train_images)
    for task in orders:
        assert torch.equal(task.test_labels, digits.test_labels)
        for images, old in (
            (task.train_images, digits.train_images), (task.test_images, digits.test_images),
        ):  # fmt: skip
            assert torch.equal(images.sort(1).values, old.sort(1).values)
    assert len({tuple(task.train_images[0].tolist()) for task in orders}) == 4
    longer = tasks_of(digits, 6, 3, by_class=False)
    for a, b in zip(orders, longer, strict=False):
        assert torch.equal(a.train_images, b.train_images)
    other = tasks_of(digits, 2, 4, by_class=False)[1]
    assert not torch.equal(other.train_images, orders[1].train_images)


def test_each_task_has_classes_of_its_own() -> None:
    digits = load()
    tasks = tasks_of(digits, 5, 0, by_class=True)
    own = [set(task.train_labels.tolist()) for task in tasks]
    assert [len(classes) for classes in own] == [2] * 5
    assert set().union(*own) == set(range(10))
    for task, classes in zip(tasks, own, strict=True):
        assert set(task.test_labels.tolist()) == classes
        label = task.train_labels[0]
        assert torch.equal(
            task.train_images[task.train_labels == label],
            digits.train_images[digits.train_labels == label],
        )
    assert own != [
        set(task.train_labels.tolist()) for task in tasks_of(digits, 5, 1, by_class=True)
    ]


def test_of_new_classes_replay_keeps_the_old_ones_and_nothing_else_does_without() -> None:
    settings = Settings(epochs=8, by_class=True)
    rows = {}
    for name in ("none", "replay"):
        run = Run(name, METHODS[name].strength, 2, seed=0)
        rows[name] = run_tasks(run, StopRequest(), settings, load())["accuracy"]
    assert rows["none"][0] == rows["replay"][0]
    assert rows["none"][0][0] > 90
    assert rows["none"][1][0] < 20 < 80 < rows["replay"][1][0]
    assert min(rows["none"][1][1], rows["replay"][1][1]) > 80


def test_a_run_repeats_and_every_method_learns_the_first_task_alike() -> None:
    plain = train("none", epochs=1)
    assert train("none", epochs=1) == plain
    assert [len(row) for row in plain["accuracy"]] == [2, 2]
    for method in METHODS.keys() - {"none", "joint"}:
        record = train(method, epochs=1)
        assert record["accuracy"][0] == plain["accuracy"][0], method
        assert record["accuracy"][1] != plain["accuracy"][1], method
    assert record == train(method, epochs=1)
    for method in ("ewc", "kfac"):  # without strength it is nothing
        found = train(method, epochs=1, strength=0.0)["accuracy"]
        assert found == plain["accuracy"], method


def test_a_run_can_be_stopped_after_every_epoch() -> None:
    class Count(StopRequest):
        times = 0

        def check(self) -> None:
            self.times += 1

    for method, epochs in (("none", 6), ("joint", 2)):
        stop = Count()
        run_tasks(Run(method, 0.0, 3, 0), stop, Settings(epochs=2), load())
        assert stop.times == epochs


@pytest.fixture(scope="module")
def final() -> dict[str, float]:
    """Accuracy on three tasks, six epochs each, of one seed."""
    names = [*METHODS]
    return {name: average_accuracy(train(name, tasks=3, epochs=6)["accuracy"]) for name in names}


def test_what_protects_does_and_the_wrong_side_does_not(final: dict[str, float]) -> None:
    none = final["none"]
    assert final["joint"] > 93
    for method in ("kfac", "activations", "subspace", "replay"):
        assert final[method] > 85
    for method in ("ewc", "ewc-proximal", "ewc-online", "ewc-compact"):
        assert final[method] > none
    assert final["ewc-online"] != final["ewc"]  # a penalty a task, or one for all
    for method in ("subspace-outside", "subspace-output"):
        assert final[method] < none + 8
        assert final[method] < final["subspace"] - 20


def test_proximal_and_compact_are_close_to_coupled(final: dict[str, float]) -> None:
    assert abs(final["ewc-proximal"] - final["ewc"]) < 6
    assert abs(final["ewc-compact"] - final["ewc"]) < 6


def test_proximal_stays_finite_at_any_strength() -> None:
    record = train("ewc-proximal", strength=1e12, epochs=4)
    # The first task is nearly kept: what it does not need is all that may change.
    assert record["accuracy"][1][0] > record["accuracy"][0][0] - 10
    assert record["accuracy"][1][0] > 70


def test_forgetting() -> None:
    assert forgetting([[90.0, 10.0], [60.0, 95.0]]) == 30.0
    assert forgetting([[90.0, 95.0]]) is None


def test_table() -> None:
    def record(method: str, seed: int, last: float) -> dict[str, Any]:
        accuracy = [[90.0, 10.0], [last, 94.0]]
        rows = accuracy[1:] if method == "joint" else accuracy
        strength = METHODS[method].strength
        return {"method": method, "strength": strength, "tasks": 2, "seed": seed,
                "accuracy": rows, "cpu_seconds": 1.25}  # fmt: skip

    runs = [record(m, s, 50.0 + 4 * s) for m in ("none", "kfac", "joint") for s in (0, 1)]
    lines = markdown_table(Settings(), runs).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert cells[2] == ["2", "none", "", "73.0 ± 1.0", "60.3 to 85.7", "38.0 ± 2.0", "1.2"]
    assert cells[3][:3] == ["2", "kfac", f"{METHODS['kfac'].strength:g}"]
    assert cells[4][5] == ""
    assert len({len(line) for line in lines[:5]}) == 1
    assert "of 2 seeds (0 to 1)" in lines[6]
    assert "test set" in lines[6]


def test_a_penalty_that_breaks_the_network_does_not_end_the_run() -> None:
    for broken in (torch.zeros(3, 3), torch.full((3, 3), torch.inf), torch.full((3, 3), 3e38)):
        assert not memory_methods._spans_a_subspace(broken)
    assert memory_methods._spans_a_subspace(torch.ones(3, 3))
    settings = Settings(epochs=4, by_class=True)
    record = run_tasks(Run("subspace", 5e6, 5, 0), StopRequest(), settings, load())
    assert len(record["accuracy"]) == 5
