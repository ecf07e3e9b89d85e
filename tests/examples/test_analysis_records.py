"""Reading metrics: what is taken, and the one line that bad input gets."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from analysis_records import (
    DEMO,
    curve,
    grown_series,
    trained,
    write,
    write_run,
)

from analysis.records import (
    chain,
    read_logs,
    read_metrics,
    rounded,
    run_settings,
    sizes_of,
    thinned_curve,
)
from common.errors import UsageError
from trainer.step_log import StepLog


def test_the_committed_demo_is_read() -> None:
    records = read_metrics([DEMO])
    root, grown = records[0], next(r for r in records if r.parent is not None)
    assert grown.parent == root.name
    assert (root.growth_flops, grown.growth_flops) == (0, 4 * grown.params)
    assert grown.own_flops == grown.flops + grown.fisher_flops + grown.growth_flops


def test_several_seeds_are_several_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{seed}.json", grown_series(seed)) for seed in (1, 2)]
    assert sorted({r.seed for r in read_metrics(paths)}) == [1, 2]
    with pytest.raises(UsageError, match=r"d2-scratch with seed 1 is in .*1\.json already"):
        read_metrics([paths[0], paths[0]])


def test_fields_that_follow_may_be_absent(tmp_path: Path) -> None:
    record = trained("d2-scratch", 3.0)
    for key in ("lineage_flops", "lineage_tokens", "fisher_flops", "warnings"):
        del record[key]
    (found,) = read_metrics([write(tmp_path / "metrics.json", [record])])
    assert (found.lineage_flops, found.fisher_flops, found.growth_flops) == (record["flops"], 0, 0)
    assert (found.lineage_tokens, found.warnings, found.devices) == (record["tokens"], (), 1)
    record["growth_flops"] = 7
    (found,) = read_metrics([write(tmp_path / "metrics.json", [record])])
    assert found.own_flops == record["flops"] + 7


def test_a_record_knows_its_cooled_branches(tmp_path: Path) -> None:
    records = grown_series()
    del records[3:]
    found = read_metrics([write(tmp_path / "metrics.json", records)])
    assert [r.size for r in found] == ["d2", "d4", "d4"]
    assert sizes_of(found[::-1]) == ["d2", "d4"]
    first, grown, twin = found
    assert (grown.share, grown.full_steps, grown.cooldown_steps) == (0.4, 100, 10)
    assert (first.scaling_params, grown.scaling_params) == (2000, 4000)
    assert [(b.share, b.val_bpb, b.tokens) for b in grown.cooled] == [
        (0.2, pytest.approx(2.65), 20 * 400), (0.4, pytest.approx(2.45), 40 * 400),
    ]  # fmt: skip
    assert grown.cooled[-1].flops == grown.flops == 40 * twin.flops // 100


def test_a_record_of_the_old_trainer_is_its_own_only_branch() -> None:
    for record in read_metrics([DEMO]):
        assert record.size == record.name.split("-")[0]
        assert (record.share, record.full_steps, record.cooldown_steps) == (1.0, None, None)
        (branch,) = record.cooled
        assert (branch.flops, branch.val_bpb) == (record.flops, record.val_bpb)


def branches(*shares: float, **changes: Any) -> dict[str, Any]:
    record = trained("d3-scratch", dict.fromkeys(shares, 2.0))
    record["cooled"][0] |= changes
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**branches(0.5, 1.0), "cooled": []}, "the last of its cooled branches is not the model"),
        ({**branches(0.5, 1.0), "share": 0.5}, "the last of its cooled branches is not the model"),
        ({**branches(0.5, 1.0), "flops": 5}, "the last of its cooled branches is not the model"),
        (branches(1.0, 0.5), "the shares of its cooled branches, [1.0, 0.5], do not rise"),
        (branches(0.5, 1.0, share=0.0), "cooled branch 0: share is 0.0, not from 1e-06"),
        (branches(0.5, 1.0, val_bpb="low"), "cooled branch 0: val_bpb is 'low'"),
        ({**branches(1.0), "cooled": [3]}, "cooled branch 0 is not an object"),
        ({**branches(1.0), "cooled": 3}, "cooled is 3, not of type list"),
        ({**branches(1.0), "trunk_steps": 101}, "trunk_steps is 101, not from 1 to 100"),
        ({**branches(1.0), "size": "4/5"}, "size is '4/5', not a printable word"),
        ({**branches(1.0), "full_steps": 0}, "full_steps is 0, not from 1"),
    ],
)
def test_bad_branches_are_refused_by_name(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read_metrics([write(tmp_path / "metrics.json", [record])])
    assert f"d3-scratch: {message}" in str(caught.value)


def test_one_model_of_a_size_arm_and_seed(tmp_path: Path) -> None:
    records = [*grown_series(), {**trained("d4-grown", 2.0), "name": "again"}]
    with pytest.raises(UsageError, match="again and d4-grown are both d4 of the arm grown with se"):
        read_metrics([write(tmp_path / "metrics.json", records)])


def change(key: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda records: records[1].__setitem__(key, value)


def old(**fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    """A record of the old trainer, without cooled branches, with these fields."""
    return lambda records: (records[1].pop("cooled"), records[1].update(fields))[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("params", "many"), "d4-grown: params is 'many', not of type int"),
        (change("params", True), "params is True"),
        (change("params", 0), "params is 0, not from 1 to 1e+30"),
        (change("flops", 10**31), "flops is 1" + "0" * 31 + ", not from 1 to 1e+30"),
        (old(depth=10**9), "depth is 1000000000, not from 1 to 10000"),
        (old(depth=None), "depth is None, not of type int"),
        (change("seed", 10**40), "seed is 1"),
        (change("name", "a/b"), "name is 'a/b', not a printable word without a slash"),
        (change("arm", "a\nb"), "arm is 'a\\nb', not a printable word"),
        (change("arm", "x" * 3000), "not a printable word"),
        (change("parent", "a\0"), "parent is 'a\\x00', not a printable word"),
        (change("name", "\ud800"), "is not JSON"),
        (change("flops", 10**400), "it holds a number that is too large"),
        (change("val_bpb", -0.1), "val_bpb is -0.1, below 0"),
        (change("val_bpb", "low"), "val_bpb is 'low', not of type float"),
        (change("warnings", "one"), "warnings is 'one', not a list of texts"),
        (change("warnings", [1]), "warnings is [1], not a list"),
        (change("pulls", [1]), "pulls is [1], not of type dict"),
        (change("pulls", {"step": [1], "wte": 0.5}), "pulls are no columns of one length"),
        (change("pulls", {"step": [1, 2], "wte": [0.5]}), "pulls are no columns of one length"),
        (change("pulls", {"wte": [0.5]}), "pulls have no steps"),
        (change("pulls", {"step": [1], "wte": [-0.5]}), "wte is -0.5, not from 0"),
        (change("lineage_tokens", 1), "lineage_tokens is 1, not from"),
        (change("devices", 0), "devices is 0, not from 1"),
        (change("seconds", None), "seconds is None"),
        (change("seed", 1.5), "seed is 1.5, not of type int"),
        (change("parent", "d9"), "the parent d9 of d4-grown has no record"),
        (lambda records: records[1].pop("flops"), "d4-grown has no flops"),
        (lambda records: records[1].pop("lineage_flops"), "d4-grown has no lineage_flops"),
        (lambda records: records[1].pop("name"), "record 1 has no name"),
        (lambda records: records.append(3), "record 5 is not an object"),  # type: ignore[arg-type]
        (lambda records: records.append(dict(records[0])), "d2-scratch with seed 0 is in"),
        (lambda records: records.clear(), "is not a list of records"),
    ],
)
def test_bad_records_are_refused_by_name(
    tmp_path: Path, spoil: Callable[[list[dict[str, Any]]], object], message: str
) -> None:
    records = grown_series()
    spoil(records)
    with pytest.raises(UsageError) as caught:
        read_metrics([write(tmp_path / "metrics.json", records)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"{}", b"3"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="name a metrics"):
        read_metrics([path])
    with pytest.raises(UsageError, match="No such file"):
        read_metrics([tmp_path / "absent.json"])


def test_a_chain_holds_the_ancestors_of_its_arm(tmp_path: Path) -> None:
    records = read_metrics([write(tmp_path / "metrics.json", grown_series())])
    assert [r.name for r in chain(records, "grown", 0)] == [
        "d2-scratch", "d4-grown", "d6-grown",
    ]  # fmt: skip
    assert [r.size for r in chain(records, "scratch", 0)] == ["d2", "d4", "d6"]
    assert chain(records, "scratch", 1) == []


def test_a_model_that_diverged_is_read_as_such(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        records = grown_series()
        records[1]["val_bpb"] = value
        found = read_metrics([write(tmp_path / "metrics.json", records)])
        assert [r.name for r in found if r.diverged] == ["d4-grown"]


def test_arms_of_one_seed_may_lie_in_several_files(tmp_path: Path) -> None:
    plain = write(tmp_path / "a" / "metrics.json", grown_series())
    root = trained("d2-scratch+ars", 3.0)
    controlled = [root, trained("d4-grown+ars", {0.4: 2.4}, root)]
    other = write(tmp_path / "b" / "metrics.json", controlled)
    found = read_metrics([plain, other])
    assert {r.seed for r in found} == {0}
    assert [r.name for r in chain(found, "grown+ars", 0)] == ["d2-scratch+ars", "d4-grown+ars"]


def test_logs_beside_the_metrics_are_found(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.json", [trained("d2-scratch", 3.0), trained("d4-scratch", 2.5)]
    )
    with StepLog(tmp_path / "log_d2-scratch.csv", None) as log:
        log.write({"step": 1, "flops": 100, "phi": 1.0})
    with StepLog(tmp_path / "log_d3-scratch.csv", None):
        pass
    logs = read_logs([path], read_metrics([path]))
    assert list(logs) == [("d2-scratch", 0)]
    assert logs["d2-scratch", 0][0]["flops"] == 100


def test_curves_are_thinned_to_where_validation_was_measured() -> None:
    record = trained("d2-scratch", 3.0)
    rows = curve(record, 8.0, 3.2)
    for row in rows:
        row["phi"] = None
        row["loss"] = None if row["step"] == 0 else float(row["step"])
        if row["step"] not in (0, 3, 8):
            row["val_bpb"] = None
    thin = thinned_curve(rows)
    assert thin["step"] == [0, 3, 8]
    assert thin["flops"] == [row["flops"] for row in rows if row["step"] in (0, 3, 8)]
    assert thin["loss"] == [None, 2.0, 6.0], "means of 1, 2, 3 and of 4 ... 8"
    assert thin["lr"][0] is None
    assert thin["lr"][2] == rounded(rows[8]["lr"]), "not a mean"
    assert "phi" not in thin
    assert thinned_curve([]) == {}


def test_settings_hold_no_paths_of_the_machine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = write_run(folder, grown_series(), data=str(tmp_path / "text.txt"), words=["a/b", "/c/d"])
    (run,) = run_settings([path, tmp_path / "absent" / "metrics.json"])
    assert run["settings"]["data"] == "text.txt"
    assert run["settings"]["words"] == ["a/b", "d"]
    assert run["settings"]["depths"] == [2, 4, 6]


def test_json_has_no_word_for_what_is_no_number() -> None:
    assert [rounded(v) for v in (None, 5, 1.23456789, math.inf)] == [None, 5, 1.23457, None]
