"""A damaged log costs rows and never the run; one that was changed is noticed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_series import Series, Stop, results

from analysis.records import read_logs, read_metrics
from common.errors import RunInterruptedError, UsageError
from trainer.step_log import StepLog, check_log, read_log

ROWS = 9
LINE = "line {} of log.csv is damaged"


def write(path: Path, factor: float = 0.1) -> dict[str, object]:
    """Nine rows; what the log says of the first six."""
    with StepLog(path, None) as log:
        for step in range(ROWS):
            log.write({"step": step, "loss": factor * step, "flops": 100 * step, "val_bpb": 2.5})
            if step == 5:
                facts = log.flush()
    assert facts is not None
    return facts


def flipped(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_no_flipped_bit_stops_a_run(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    facts = write(path)
    whole, rows = path.read_bytes(), read_log(path)
    end = whole.index(b"\n6,")  # what comes after the last state is computed again
    silent = []
    for at in range(0, len(whole), 3):
        bit = at % 8
        path.write_bytes(whole)
        flipped(path, at, bit)
        assert len(read_log(path)) <= ROWS
        path.write_bytes(whole)
        flipped(path, at, bit)
        with StepLog(path, 5, facts) as log:
            kept = read_log(path)
        assert [row["step"] for row in kept] == list(range(len(kept)))
        if log.warning is None:
            assert kept == rows[:6]
            silent.append(at)
        else:
            (aside,) = tmp_path.glob("log.csv.damaged*")
            assert log.warning.endswith(f"it is kept as {aside.name}")
            aside.unlink()
    assert min(silent, default=end) >= end - 1


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "a byte that is no UTF-8": (lambda c: c.replace(b"\n3,", b"\n\xff,"), 3, LINE.format(5)),
    "a quotation mark": (lambda c: c.replace(b"\n3,", b'\n"3,'), 3, LINE.format(5)),
    "a NUL": (lambda c: c.replace(b"\n3,", b"\n\0,"), 3, LINE.format(5)),
    "a letter": (lambda c: c.replace(b"300", b"3a0"), 3, LINE.format(5)),
    "a comma": (lambda c: c.replace(b"300", b"3,0"), 3, LINE.format(5)),
    "a joined line": (lambda c: c.replace(b"\n3,", b" 3,"), 2, LINE.format(4)),
    "5,000 digits": (lambda c: c.replace(b"300", b"3" * 5000), 3, LINE.format(5)),
    "a step too early": (lambda c: c.replace(b"\n4,", b"\n1,"), 4, LINE.format(6)),
    "the header": (lambda c: c.replace(b"loss", b"lass"), 0, LINE.format(1)),
    "nothing": (lambda c: b"", 0, LINE.format(1)),
    "a digit": (lambda c: c.replace(b"300", b"800"), 6, "is not what was written up to step 5"),
    "the end": (lambda c: c[: c.index(b"\n4,") + 1], 4, "is not what was written up to step 5"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_kept_of_a_damaged_log(damage: str, tmp_path: Path) -> None:
    change, sound, said = DAMAGES[damage]
    path = tmp_path / "log.csv"
    facts = write(path)
    content = change(path.read_bytes())
    assert content != path.read_bytes()
    path.write_bytes(content)
    with StepLog(path, 5, facts) as log:
        kept = read_log(path)
        again = log.flush()
    assert [row["step"] for row in kept] == list(range(sound))
    assert log.warning is not None
    assert said in log.warning
    assert (tmp_path / "log.csv.damaged").read_bytes() == content
    with StepLog(path, 5, again) as log:  # what was cut once is whole
        assert log.warning is None


def test_a_log_that_is_missing_or_another_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    facts = write(path)
    with StepLog(path, 5, facts) as log:
        assert log.warning is None
    write(path, factor=0.2)
    with StepLog(path, 5, facts) as log:
        assert log.warning is not None
    path.unlink()
    with StepLog(path, 5, facts) as log:
        assert log.warning == "log.csv is not what was written up to step 5"
    with StepLog(path, 5) as log:  # a state of an earlier version says nothing of its log
        assert log.warning is None


def test_a_log_that_goes_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with StepLog(path, None) as log:
        log.flush()
        path.rename(tmp_path / "other")
        with pytest.raises(UsageError, match=r"log.csv was removed or replaced"):
            log.flush()
        path.write_text("")
        with pytest.raises(UsageError, match=r"log.csv was removed or replaced"):
            log.flush()


def test_finished_logs_are_read_as_far_as_they_are_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    facts = write(path)
    check_log(path, None)
    path.write_bytes(path.read_bytes().replace(b"\n3,", b"\n\xff,").replace(b"\n7,", b"\n7;"))
    assert [row["step"] for row in read_log(path)] == [0, 1, 2, 4, 5, 6, 8]
    assert read_log(path) == read_log(path)
    said = f"warning: {path} is damaged in line 5 and 1 more: its other rows are used\n"
    assert capsys.readouterr().err == said
    check_log(path, facts)
    assert "is not what was written" in capsys.readouterr().err


def test_an_interrupted_series_goes_on_with_a_damaged_log(
    series: Series, straight: dict[str, dict[str, object]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(RunInterruptedError):
        series(tmp_path, Stop(18))
    (state,) = tmp_path.glob("checkpoints/*/*.pt")
    name = state.parent.name
    damaged = tmp_path / f"log_{name}.csv"
    content = damaged.read_bytes()
    assert content.count(b"\n") > 3
    damaged.write_bytes(content.replace(b"\n2,", b"\n\xff,"))
    finished = next(p for p in tmp_path.glob("log_*.csv") if p != damaged)
    shutil.copy(damaged, finished)
    series(tmp_path)
    said = capsys.readouterr().err
    assert f"{name}: line 4 of log_{name}.csv is damaged" in said
    assert f"{finished} is not what was written" in said
    found = results(tmp_path)
    assert found["models"] == straight["models"]
    steps = [row["step"] for row in found["logs"][damaged.name]]
    assert steps == [0, 1, *range(int(state.stem) + 1, steps[-1] + 1)]
    (record,) = (r for r in found["records"] if r["name"] == name)
    assert "is damaged" in record["warnings"][-1]
    metrics = tmp_path / "metrics.json"
    assert read_logs([metrics], read_metrics([metrics]))[name, 0]
