"""Words of arms that mean something to what draws and writes them."""

import html
import json
from pathlib import Path

import pytest
from analysis_records import grown_series

from analyze import main


@pytest.mark.parametrize("arm", ["$x^{$", "_hidden", "<b>&{{ 7 }}", "%s\\", "\u65e5"])
@pytest.mark.filterwarnings("ignore:Glyph")  # the font has not every character
def test_any_printable_word_is_shown(
    arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(json.dumps(grown_series()).replace('"grown"', json.dumps(arm)))
    assert arm in {record["arm"] for record in records}
    (tmp_path / "metrics.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    words = ["--metrics", str(tmp_path / "metrics.json"), "--bootstraps", "0", "--out", str(out)]
    assert main(words) == 0, capsys.readouterr().err
    report = (out / "report.html").read_text(encoding="utf-8")
    assert html.escape(arm) in report
    assert arm == html.escape(arm) or arm not in report
