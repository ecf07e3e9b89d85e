"""``examples/analyze.py`` as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from analysis_records import DEMO, grown_series, write, write_run
from program_helpers import Refused

import analyze
from analysis.bundle import MINI_BUNDLE
from analyze import main
from ars.models import GPT, GPTConfig, miniseries_config
from common.checkpoint_file import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "d2-scratch.pt"
    model = GPT(miniseries_config(2), torch.Generator().manual_seed(0))
    save_checkpoint(path, {"step": 1, "model": model.state_dict(), "record": None})
    return path


def test_everything_is_written(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    records = grown_series()
    records[1]["warnings"] = ["the penalty is large"]
    metrics = write_run(tmp_path / "run", records)
    words = ["--metrics", str(metrics), "--out", str(out), "--device", "a100", "--price", "2"]
    words += ["--bootstraps", "10", "--eval-bundle", str(MINI_BUNDLE), "--checkpoint"]
    assert main([*words, str(checkpoint), "--max-per-task", "4", "--sequence-len", "40"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "No conclusion from fewer than 3 seeds: grown at d4, d6" in printed.out
    assert "56% saved at equal loss" in printed.out
    assert "not shown: 60 % cheaper" in printed.out
    assert "warning: d4-grown, seed 0: the penalty is large" in printed.out
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "metrics/core.json", "metrics/cost_analysis.json", "metrics/scaling_laws.json",
        "metrics/training_log.json", "report.html",
    ]  # fmt: skip
    laws = json.loads((out / "metrics" / "scaling_laws.json").read_text())
    assert [arm["arm"] for arm in laws["arms"]] == ["scratch", "grown"]
    assert len(laws["claims"]) == 4
    assert laws["comparisons"][1]["difference"] == pytest.approx(-0.05)
    cost = json.loads((out / "metrics" / "cost_analysis.json").read_text())
    assert (cost["peak_flops"], cost["price_per_hour"], cost["devices"]) == (312e12, 2.0, None)
    assert cost["models"][0]["price"] == pytest.approx(4.0 / 3600 * 2)
    (series,) = cost["series"]
    assert (series["arm"], series["at_equal_loss"]) == ("grown", True)
    assert series["saving"]["mean"] == pytest.approx(0.557, abs=1e-3)
    assert [m["size"] for m in series["members"]] == ["d2", "d4", "d6"]
    assert next(f"{plan['flops']:.3g}" for plan in cost["on_paper"].values()) == "4.64e+19"
    core = json.loads((out / "metrics" / "core.json").read_text())["d2-scratch"]
    assert core["core_v1"] is None
    assert [task["items"] for task in core["tasks"]] == [4, 4, 4]
    assert [task["cropped"] for task in core["tasks"]] == [4, 4, 4]
    assert "d6-grown" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--metrics"),
        (["--metrics", "absent.json"], "absent.json cannot be read (No such file"),
        (["--metrics", "DEMO", "DEMO"], "is in"),
        (["--metrics", "DEMO", "--price", "-1"], "'-1' is not a number from 0"),
        (["--metrics", "DEMO", "--price", "nan"], "'nan' is not a number"),
        (["--metrics", "DEMO", "--devices", "1.5"], "'1.5' is not a whole number from 1"),
        (["--metrics", "DEMO", "--device", "abacus"], "'abacus' is not one of"),
        (["--metrics", "DEMO", "--device", "l4", "--peak-flops", "1e12"], "not allowed with"),
        (["--metrics", "DEMO", "--peak-flops", "1e9"], "times the operations that 1 x 1e+09"),
        (["--metrics", "DEMO", "--eval-bundle", "DIR"], "need each other"),
        (["--metrics", "DEMO", "--checkpoint", "x.pt"], "need each other"),
        (["--metrics", "DEMO", "--eval-bundle", "DIR", "--checkpoint", "x.pt"], "core.yaml"),
        (
            [
                "--metrics",
                "DEMO",
                "--eval-bundle",
                "MINI",
                "--checkpoint",
                "x.pt",
                "--eval-device",
                "cuda:99",
            ],
            "--eval-device cuda:99 is not available",
        ),
        (["--metrics", "DEMO", "--eval-bundle", "MINI", "--checkpoint", "x.pt"], "x.pt "),
        (["--metrics", "DEMO", "--out", "FILE"], "is a file: name a folder"),
        (["--metrics", "DEMO", "--out", "FILE/below"], "below cannot be created, file is a file"),
        (["--metrics", "DEMO", "--metric", "DEMO"], "there is no --metric; did you mean"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    words: list[str],
    message: str,
) -> None:
    # Its figures take the longest.
    monkeypatch.setattr("analysis.run_report.render_report", lambda *_: "")
    (tmp_path / "file").write_text("")
    names = {"DEMO": str(DEMO), "DIR": str(tmp_path), "MINI": str(MINI_BUNDLE), "FILE": "file"}
    argv = ["--bootstraps", "0"]
    argv += [names.get(w, w.replace("FILE", "file") if "FILE/" in w else w) for w in words]
    assert message in refused(main, argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": 1}, "holds no model"),
        (
            {"model": GPT(miniseries_config(1, vocab_size=300, sequence_len=8)).state_dict()},
            "has 300 tokens and no tokenizer.json",
        ),
        ({"model": {"wte.weight": torch.zeros(256, 64)}}, "another kind of model"),
        (
            {"model": GPT(GPTConfig(256, 16, 1, 2, 32)).state_dict()},
            "another kind of model",
        ),
    ],
)
def test_other_checkpoints_are_refused(
    tmp_path: Path,
    refused: Refused,
    content: dict[str, object],
    message: str,
) -> None:
    save_checkpoint(tmp_path / "x.pt", content)
    words = ["--metrics", str(DEMO), "--bootstraps", "0", "--out", str(tmp_path / "out")]
    words += ["--eval-bundle", str(MINI_BUNDLE), "--checkpoint", str(tmp_path / "x.pt")]
    words += ["--sequence-len", "32"]
    assert message in refused(main, words)


def test_too_few_items_for_the_examples(tmp_path: Path, checkpoint: Path, refused: Refused) -> None:
    words = ["--metrics", str(DEMO), "--bootstraps", "0", "--out", str(tmp_path / "out")]
    words += ["--eval-bundle", str(MINI_BUNDLE), "--checkpoint", str(checkpoint)]
    words += ["--sequence-len", "40"]
    line = refused(main, [*words, "--max-per-task", "2"])
    assert "2 items of mini_choice are too few for 2 examples each" in line


def test_models_of_several_runs_are_scored_apart(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.run_report.render_report", lambda *_: "")
    other = tmp_path / "other" / checkpoint.name
    other.parent.mkdir()
    other.write_bytes(checkpoint.read_bytes())
    words = ["--metrics", str(DEMO), "--bootstraps", "0", "--out", str(tmp_path / "out")]
    words += ["--eval-bundle", str(MINI_BUNDLE), "--checkpoint", str(checkpoint), str(other)]
    assert main([*words, "--sequence-len", "64"]) == 0
    scores = json.loads((tmp_path / "out/metrics/core.json").read_text())
    assert scores.keys() == {str(checkpoint), str(other)}
    assert scores[str(checkpoint)] == scores[str(other)]


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze, "run", interrupted)
    assert main(["--metrics", str(DEMO)]) == 130
    assert capsys.readouterr().err == "interrupted: run the same command again\n"


def test_a_missing_module_is_one_line(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.delitem(sys.modules, "analysis.run_report")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    expected = "error: the module jinja2 is missing: pip install 'ars-triton[examples]'\n"
    assert refused(main, ["--metrics", str(DEMO)]) == expected


def test_it_runs_as_a_program_from_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.json", grown_series())
    program = Path(__file__).resolve().parents[2] / "examples" / "analyze.py"
    done = subprocess.run(
        [sys.executable, str(program), "--metrics", path.name, "--bootstraps", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "analysis" / "report.html").stat().st_size > 50_000
