"""Options: defaults, files and the command line over them, and what is wrong with each."""

import dataclasses
import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from program_helpers import Refused

import miniseries
from common.command_line import OptionError
from trainer import settings
from trainer.arguments import Arguments, parse_arguments, parse_plan, parse_sample
from trainer.settings import PEAK_FLOPS, Machine, SeriesConfig

EXAMPLES = Path(miniseries.__file__).parent
DEFAULT_FILE = EXAMPLES / "config.yaml"


pytestmark = pytest.mark.usefixtures("own_folder")


def written(text: str, name: str = "file.yaml") -> str:
    Path(name).write_text(text)
    return name


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_arguments([*words, "--print-config"])
    assert exit_.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_defaults_are_those_of_the_dataclasses() -> None:
    full = parse_arguments([])
    assert full == Arguments(
        out=Path("out/demo"),
        data=None,
        column=None,
        tokenizer="bytes",
        cache=None,
        config=SeriesConfig(),
        machine=Machine(),
    )


def test_quick() -> None:
    quick = parse_arguments(["--quick"])
    assert quick.out == Path("out/quick")
    named = {key: value for key, value in settings.QUICK.items() if key not in ("out", "steps")}
    assert quick.config == SeriesConfig(**named, steps=settings.QUICK["steps"] * 3)
    both = parse_arguments(["--quick", "--steps", "70", "--depths", "2,4", "--seed", "5"])
    assert both.config.steps == (70, 70)
    assert both.config.seed == 5
    file = written("batch_size: 2\n")
    assert parse_arguments(["--config", file, "--quick"]).config.batch_size == 2


def test_one_number_of_steps_is_that_of_every_size() -> None:
    assert doctest.testmod(settings).failed == 0
    assert parse_arguments([]).config.ratio == 8.0
    assert parse_arguments(["--depths", "4-6", "--steps", "9"]).config.steps == (9, 9, 9)
    assert parse_arguments(["--depths", "2,3", "--steps", "9,8"]).config.steps == (9, 8)
    ratio = parse_arguments(["--ratio", "12"]).config
    assert (ratio.steps, ratio.ratio) == (None, 12.0)


def test_every_field_is_an_option() -> None:
    words = {
        "arms": ("scratch+muon,grown+ars+distill", ("scratch+muon", "grown+distill+ars")),
        "depths": ("10-12", (10, 11, 12)),
        "width_per_depth": ("32", 32),
        "head_dim": ("16", 16),
        "parents": ("10,11", (10, 11)),
        "steps": ("5,6,7", (5, 6, 7)),
        "cooldown": ("0.15", 0.15),
        "cooldown_shape": ("linear", "linear"),
        "lineage": ("1.25,1.5", (1.25, 1.5)),
        "scratch_shares": ("0.5,1", (0.5, 1.0)),
        "grow_at": ("0.5", 0.5),
        "blocks": ("inserted", "inserted"),
        "batch_size": ("rule", "rule"),
        "sequence_len": ("512", 512),
        "lr": ("rule", "rule"),
        "muon_lr": ("rule", "rule"),
        "muon_adamw_lr": ("0.02", 0.02),
        "rate_exponent": ("0.5", 0.5),
        "weight_decay": ("rule", "rule"),
        "betas": ("0.8,0.9", (0.8, 0.9)),
        "max_grad_norm": ("0", 0.0),
        "warmup_steps": ("0", 0),
        "ewc_strength": ("1e-3", 1e-3),
        "subspace_strength": ("2e-3", 2e-3),
        "distill_strength": ("0.2", 0.2),
        "distill_temperature": ("3", 3.0),
        "fisher_samples": ("8", 8),
        "precision": ("bf16", "bf16"),
        "seed": ("3", 3),
        "eval_windows": ("10", 10),
        "curve_windows": ("11", 11),
        "curve_points": ("12", 12),
        "device": ("cuda:1", "cuda:1"),
        "threads": ("2", 2),
        "device_batch_size": ("2", 2),
        "keep": ("4", 4),
        "checkpoint_seconds": ("60", 60.0),
        "peak_flops": ("H200", PEAK_FLOPS["h200"]),
    }
    switches = ("compile", "fsdp", "recompute", "tensorboard")
    line = [f"--{key.replace('_', '-')}={value}" for key, (value, _) in words.items()]
    found = parse_arguments([*line, *(f"--{name}" for name in switches)])
    given = {**dataclasses.asdict(found.config), **dataclasses.asdict(found.machine)}
    del given["ratio"], given["shares"]  # the alternatives to steps and lineage
    assert parse_arguments(["--shares", "0.25,1.5"]).config.shares == (0.25, 1.5)
    assert given == {
        **{key: value for key, (_, value) in words.items()},
        **dict.fromkeys(switches, True),
    }


def test_the_command_line_wins_over_files_and_later_files_over_earlier() -> None:
    first = written("lr: 1e-3\nseed: 1\nkeep: 5\ncompile: true\nthreads: 2\n", "first.yaml")
    second = written("seed: 2\ndepths: 2-3\nbetas: [0.8, 0.9]\n", "second.yaml")
    found = parse_arguments([
        "--lr", "2e-3", "--config", first, "--no-compile", f"--config={second}", "--threads=none",
    ])  # fmt: skip
    assert found.config == SeriesConfig(lr=2e-3, seed=2, depths=(2, 3), betas=(0.8, 0.9))
    assert found.machine == Machine(keep=5)
    assert parse_arguments(["--config", second, "--config", first]).config.seed == 1


def test_the_last_of_steps_and_ratio_wins() -> None:
    by_ratio, by_steps = written("ratio: 4\n", "ratio.yaml"), written("steps: 5\n", "steps.yaml")
    words = ["--config", by_ratio]
    assert parse_arguments(words).config.steps is None
    assert parse_arguments([*words, "--steps", "5"]).config == SeriesConfig(steps=(5,) * 4)
    assert parse_arguments([*words, "--config", by_steps]).config.steps == (5,) * 4
    words = ["--config", by_steps]
    assert parse_arguments([*words, "--ratio", "3"]).config == SeriesConfig(steps=None, ratio=3.0)
    assert parse_arguments([*words, "--config", by_ratio]).config.ratio == 4.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lrr: 1\n", "there is no lrr; did you mean lr?"),
        ("batch-size: 8\n", "there is no batch-size; did you mean batch_size?"),
        ("3: 8\n", "there is no 3"),
        ("lr: fast\n", "lr: 'fast' is not a number above 0 and up to 1, nor 'rule'"),
        ("lr: {peak: 1}\n", "lr: {'peak': 1} is not a number"),
        ("lr: true\n", "lr: True is not a number"),
        ("lr:\n", "lr: it has no value; its default is 0.003"),
        ("seed: 1.5\n", "seed: 1.5 is not a whole number"),
        ("seed: true\n", "seed: True is not a whole number"),
        ("compile: maybe\n", "compile: 'maybe' is neither true nor false"),
        ("compile: 1\n", "compile: 1 is neither true nor false"),
        ("shares: [0.4, 0.2]\n", "shares: '0.4,0.2' are not ascending shares"),
        ("blocks: middle\n", "is not one of 'appended', 'inserted'"),
        ("depths: []\n", "is not a series"),
        ("depths: [2.0, 3.0]\n", "is not a series"),
        ("arms: [grown+ecw]\n", "arms: grown+ecw: there is no 'ecw'; did you mean ewc?"),
        ("arms: []\n", "arms: no way to train is named"),
        ("steps: []\n", "steps: no number is named"),
        ("betas: [0.9]\n", "is not a pair of numbers"),
        ("precision: fp61\n", "is not one of 'fp32', 'bf16', 'fp16'; did you mean fp16?"),
        ("data: 5\n", "data: 5 is not a text"),
        ("steps: 5\nratio: 4\n", "ratio: not allowed with steps"),
        ("quick: true\n", "quick goes on the command line only"),
        ("config: other.yaml\n", "config goes on the command line only"),
        ("[1\n", "is not YAML"),
        ("lr: 0.01\nseed: 1\nlr: 0.02\n", "is not YAML (lr stands there twice, again in line 3)"),
        ("just words\n", "holds no options"),
        ("", "holds no options"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line_with_its_name(
    text: str, says: str, refused: Refused
) -> None:
    line = refused(parse_arguments, ["--config", written(text), "--seed", "1"])
    assert line.startswith(("error: file.yaml: ", "error: file.yaml is not YAML ("))
    assert says in line


def test_a_file_that_is_no_text(refused: Refused) -> None:
    Path("file.yaml").write_bytes(b"\xff\xfe\xfd")
    assert "file.yaml is not UTF-8" in refused(parse_arguments, ["--config", "file.yaml"])
    assert ". cannot be read" in refused(parse_arguments, ["--config", "."])


def test_a_mistake_after_a_file_is_not_laid_to_it(refused: Refused) -> None:
    line = refused(parse_arguments, ["--config", written("seed: 3\n"), "--lr", "fast"])
    assert line.startswith("error: argument --lr: 'fast'")
    line = refused(parse_arguments, ["--config", written("steps: [1, 2]\n")])
    assert "2 numbers for 4 sizes" in line


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--quick"],
        ["--ratio", "8", "--batch-size", "rule", "--lr", "rule", "--out", "somewhere/else"],
        ["--depths", "2-5", "--parents", "2,4", "--peak-flops", "h100", "--compile"],
        ["--depths", "3x48,5x64", "--shares", "0.25,0.35", "--head-dim", "8"],
        ["--data", "hf:some/name", "--column", "text", "--cache", "tokens", "--no-recompute"],
        ["--betas", "0.5,0.75", "--ewc-strength", "1e-12", "--arms", "grown+ewc,scratch+muon"],
    ],
    ids=" ".join,
)
def test_what_is_printed_says_the_same_again(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(words, capsys)
    file = written(text)
    assert parse_arguments(["--config", file]) == parse_arguments(words)
    assert printed(["--config", file], capsys) == text


def test_the_file_with_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_arguments(["--config", str(DEFAULT_FILE)]) == parse_arguments([])
    named: dict[str, Any] = yaml.safe_load(DEFAULT_FILE.read_text())
    assert set(named) == set(yaml.safe_load(printed([], capsys)))
    for line in DEFAULT_FILE.read_text().splitlines():
        assert not line[:1].isalpha() or "# " in line, "every option has a comment"


@pytest.mark.parametrize(
    ("name", "depths"),
    [("d10-d20", tuple(range(10, 21))), ("gpu-d4-d10", tuple(range(4, 11)))],
)
def test_the_files_of_larger_series(name: str, depths: tuple[int, ...]) -> None:
    found = parse_arguments(["--config", str(EXAMPLES / f"configs/{name}.yaml")])
    assert found.config.depths == depths
    assert found.config.precision == "bf16"
    assert found.machine.device == "cuda"
    assert len(list((EXAMPLES / "configs").glob("*.yaml"))) == 2


def test_planning_takes_the_options_of_training_and_its_own() -> None:
    asked = parse_plan(["--quick", "--peak-flops", "1e12", "--devices", "8", "--price", "3"])
    assert asked.arguments.config == parse_arguments(["--quick"]).config
    assert (asked.series, asked.devices, asked.mfu, asked.price) == ("own", 8, 0.4, 3.0)


def test_sampling() -> None:
    asked = parse_sample(["--checkpoint", "x.pt", "--prompt", "def ", "--top-k", "5"])
    assert (asked.checkpoint, asked.prompt, asked.top_k) == (Path("x.pt"), "def ", 5)
    assert (asked.tokens, asked.temperature, asked.count) == (200, 0.8, 1)


def test_a_file_can_be_overruled_with_none() -> None:
    file = written("data: some.txt\ncache: tokens\ncolumn: text\n")
    found = parse_arguments(
        ["--config", file, "--data", "none", "--cache", "none", "--column=none"]
    )
    assert (found.data, found.cache, found.column) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 2.0}, "lr: 2.0 is not a number above 0 and up to 1, nor 'rule'"),
        ({"seed": -1}, "seed: -1 is not a whole number from 0"),
        ({"arms": ("grwn",)}, "arms: grwn: there is no 'grwn'; did you mean grown?"),
        ({"steps": (5,)}, "steps: 1 numbers for 4 sizes"),
        ({"ratio": None}, "ratio: none, and no steps: name one of them"),
        ({"depths": (2, 3, 4), "parents": (2, 9)}, "parents: 9 is not among --depths 2,3,4"),
        ({"depths": (2, 3), "parents": (3,)}, "parents: the first size, 2, has to be there"),
        ({"depths": (4, 3)}, "depths: 4,3 are not ascending: 3 layers of width 192 do not grow"),
        ({"depths": ("3x64", "4x48")}, "depths: 3x64,4x48 are not ascending"),
        ({"depths": (2, "2x128")}, "depths: 2,2x128 are not ascending"),
        ({"depths": ("3x33", "3x66")}, "head_dim: 1 is no even divisor of the width 33"),
        ({"depths": ("3x48",), "head_dim": 32}, "head_dim: 32 is no even divisor of the width 48"),
        ({"head_dim": 7, "depths": ("3x49",)}, "head_dim: 7 is no even divisor of the width 49"),
        ({"lineage": None, "shares": (0.4, 0.2)}, "shares: '0.4,0.2' are not ascending shares"),
        ({"lineage": None, "shares": (0.1, 0.2)}, "shares: 0.1 is not above the cooldown, 0.1"),
        ({"lineage": (0.1, 1.2)}, "lineage: 0.1 is not above the cooldown, 0.1"),
        ({"shares": (0.2, 0.3)}, "lineage: beside shares, its rival: name one of them"),
        ({"lineage": None}, "lineage: none, and no shares: name one of them"),
        ({"scratch_shares": (0.5, 0.8)}, "scratch_shares: the last is 0.8, not 1"),
        ({"scratch_shares": (0.05, 1.0)}, "scratch_shares: 0.05 is not above the cooldown"),
    ],
)
def test_settings_are_held_to_their_ranges_wherever_they_come_from(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(says)}"):
        SeriesConfig(**changes)
    with pytest.raises(OptionError, match=r"^keep: 0 is not a whole number"):
        Machine(keep=0)


@pytest.mark.parametrize(
    ("depths", "heads"),
    [((2, 3), 64), (("3x48", "4x56"), 8), (("3x96",), 48), (("2x256", 5), 64), (("2x34",), 34)],
)
def test_heads_are_the_largest_that_fit_every_width(
    depths: tuple[int | str, ...], heads: int
) -> None:
    assert SeriesConfig(depths=depths).width_of_heads == heads
