"""The log, the table and the figures."""

import json
import math
from pathlib import Path
from typing import Any

from trainer.series_plan import plans_of
from trainer.series_report import markdown_table, write_metrics, write_report
from trainer.settings import SeriesConfig
from trainer.step_log import FIELDS, StepLog, read_log


def record(depth: int, arm: str, bpb: float) -> dict[str, Any]:
    share = 0.4 if arm.startswith("grown") else 1.0
    return {
        "name": f"d{depth}-{arm}",
        "size": f"d{depth}",
        "share": share,
        "depth": depth,
        "arm": arm,
        "params": 1234567,
        "tokens": 4096,
        "flops": 10**12,
        "lineage_flops": 2 * 10**12,
        "seconds": 12.34,
        "val_bpb": bpb,
        "val_bytes": 131072,
        "seed": 3,
        "cooled": [{"share": share / 2, "val_bpb": math.nan}, {"share": share, "val_bpb": bpb}],
    }


RECORDS = [
    record(2, "scratch", 3.0),
    record(2, "scratch+ars", 3.5),
    record(3, "scratch", 2.5),
    record(3, "grown+ewc", 2.25),
    record(3, "grown+ars", 2.0),
    record(4, "scratch", 2.0),
    record(4, "grown+ewc", 2.125),
]


def test_the_table_has_one_row_a_model_and_signed_differences() -> None:
    lines = markdown_table(RECORDS).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line]
    assert len(cells) == 2 + 7
    assert all(len(row) == 10 for row in cells)
    # Twins have the same optimizer and controller; of d3-grown+ars there is none.
    assert [row[-1] for row in cells[2:]] == ["", "", "", "-0.2500", "", "", "+0.1250"]
    assert cells[5][:9] == [
        "d3", "grown+ewc", "1,234,567", "4,096", "0.4", "1.000e+12", "2.000e+12", "12.3", "2.2500",
    ]  # fmt: skip
    assert len({len(line) for line in lines if "|" in line}) == 1


def test_the_notes_say_what_was_measured() -> None:
    text = markdown_table(RECORDS)
    assert "d2 has no parent" in text
    assert "131,072 bytes" in text
    assert "One seed (3)" in text
    assert "warning" not in text
    warned = [*RECORDS[:-1], {**RECORDS[-1], "warnings": ["the penalty, 3, exceeds 1"]}]
    assert "- warning: d4-grown+ewc: the penalty, 3, exceeds 1" in markdown_table(warned)


def test_a_log_is_cut_to_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with StepLog(path, None) as log:
        log.write({"step": 0, "val_bpb": 8.0})
        for step in range(1, 6):
            log.write({"step": step, "loss": 0.1 * step, "flops": 10**20 + step})
        log.flush()
    whole = path.read_text()
    with open(path, "a") as file:
        file.write("6,1,2")  # a kill in the middle of a line
    assert len(read_log(path)) == 6
    with StepLog(path, 3) as log:
        assert [row["step"] for row in read_log(path)] == [0, 1, 2, 3]
        for step in range(4, 6):
            log.write({"step": step, "loss": 0.1 * step, "flops": 10**20 + step})
    assert path.read_text() == whole
    assert path.read_text().splitlines()[0] == ",".join(FIELDS)
    rows = read_log(path)
    assert rows[0]["loss"] is None
    assert rows[3]["loss"] == 0.1 * 3
    assert rows[5]["flops"] == 10**20 + 5


def test_a_new_log_forgets_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with StepLog(path, None) as log:
        log.write({"step": 1})
    with StepLog(path, None):
        pass
    assert read_log(path) == []
    assert read_log(tmp_path / "absent.csv") == []


def test_the_report_is_written(tmp_path: Path) -> None:
    config = SeriesConfig(arms=("scratch", "scratch+ars", "grown+ewc", "grown+ars"))
    plans = plans_of(config, 10)
    for plan in plans:
        with StepLog(tmp_path / f"log_{plan.name}.csv", None) as log:
            log.write({"step": 0, "flops": 0, "val_bpb": 8.0})
            for step in range(1, 11):
                log.write({"step": step, "flops": 100 * step, "loss": 5.0 / step, "val_bpb": 7.0})
    write_metrics(tmp_path, RECORDS)
    text = write_report(tmp_path, RECORDS, plans)
    assert (tmp_path / "table.md").read_text() == text
    found = json.loads((tmp_path / "metrics.json").read_text())
    for record in RECORDS:  # of branches that diverged, too, the loss is null
        branch, end = record["cooled"]
        cooled = [{**branch, "val_bpb": None}, end]
        assert found.pop(0) == {**record, "cooled": cooled, "diverged": False}
    for figure in ("loss_validation.png", "loss_training.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / figure).stat().st_size > 5000
