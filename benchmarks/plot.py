"""Draw what benchmarks measured: each candidate's time beside what it replaces.

    python benchmarks/plot.py                                    # docs/images/speed.png
    python benchmarks/plot.py out/mine.json --out mine.png       # of --benchmark-json=out/mine.json

A source is a file of `pytest benchmarks --benchmark-json=FILE`, a file of `{"rows": [...]}` (as the
benchmarks saved until pytest-benchmark, one contest each), or a folder of either. Each source
becomes a column, each contest a panel.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
SOURCES = [HERE / "results/cpu-2-threads", HERE / "results/nvidia-h100-80gb-hbm3"]
OUT = HERE.parent / "docs/images/speed.png"
STEPS = ("adamw", "graph", "clipping", "ewc")  # the contests that are drawn, by their beginning
OURS, THEIRS, BASELINE = "#1b6ca8", "#b8b8b8", "#555555"


@dataclass(frozen=True)
class Row:
    """A candidate's figures.

    Attributes:
        candidate: Its name.
        ms: Its median, in milliseconds.
        ratio: The median over the baseline's.
    """

    candidate: str
    ms: float
    ratio: float


@dataclass
class Source:
    """What was measured on one machine.

    Attributes:
        title: The machine, the version of torch, the day.
        contests: Rows by contest, in the order of the files.
    """

    title: str
    contests: dict[str, list[Row]]


def read(path: Path) -> Source:
    """Read a file, or all files of a folder.

    Args:
        path: Where they are.

    Returns:
        The contests with a baseline, and what is common to them.

    Raises:
        ValueError: It is neither, or holds no contest.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    source = Source("", {})
    for file in files:
        try:
            content = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        found = rows_of(content, file.stem) if isinstance(content, dict) else {}
        if found and not source.title:
            source.title = f"{named(content, file)}, {machine(content)}"
        source.contests |= found
    if not source.contests:
        raise ValueError(
            f"{path} has no contest: give a file of `pytest benchmarks --benchmark-json=FILE`, "
            "or a folder of such files"
        )
    return source


def rows_of(content: dict[str, Any], stem: str) -> dict[str, list[Row]]:
    """Return the rows of either format, by contest."""
    found: dict[str, list[Row]] = {}
    for entry in content.get("benchmarks", []):
        info = entry["extra_info"]
        if "time / baseline" in info:
            row = Row(info["candidate"], entry["stats"]["median"] * 1e3, info["time / baseline"])
            found.setdefault(entry["group"], []).append(row)
    rows = [
        Row(row["candidate"], row["ms"], row["time / baseline"])
        for row in content.get("rows", [])
        if "ms" in row and "time / baseline" in row
    ]
    if rows:
        found[stem.replace("-x-", " x ").replace("-", " ", 1)] = rows
    return found


def named(content: dict[str, Any], file: Path) -> str:
    """Return what the machine is called; a folder of older files is named after it."""
    info = content.get("machine_info")
    if info is None:
        return file.parent.name.replace("-", " ")
    return f"{info['threads']} threads" if info["device"] == "cpu" else str(info["device"])


def machine(content: dict[str, Any]) -> str:
    """Return the version of torch and the day."""
    if (info := content.get("machine_info")) is not None:
        return f"torch {info['torch']}, {content['datetime'][:10]}"
    return f"torch {content['torch']}, {content['date']}"


def draw(sources: list[Source], out: Path) -> None:
    """Draw the contests about a step.

    Args:
        sources: A column each.
        out: The image.

    Raises:
        ValueError: A source has no such contest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [select(source) for source in sources]
    tall = max(sum(len(rows) + 1.6 for rows in column.values()) for column in columns)
    figure = pyplot.figure(figsize=(7.2 * len(sources), 0.27 * tall + 1.1), layout="constrained")
    for source, column, part in zip(
        sources, columns, figure.subfigures(1, len(sources), squeeze=False)[0], strict=True
    ):
        part.suptitle(source.title, fontsize=11, fontweight="bold")
        axes = part.subplots(
            len(column), squeeze=False, height_ratios=[len(rows) + 0.6 for rows in column.values()]
        )[:, 0]
        low = min(row.ratio for rows in column.values() for row in rows)
        high = max(row.ratio for rows in column.values() for row in rows)
        for (name, rows), panel in zip(column.items(), axes, strict=True):
            draw_panel(panel, name, rows)
            panel.set_xlim(low / 1.3, high * 3.2)
        axes[-1].set_xlabel("time beside the baseline's (1), logarithmic; left is faster")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def select(source: Source) -> dict[str, list[Row]]:
    """Return the contests about a step, in the order of STEPS."""
    chosen = {
        name: rows
        for start in STEPS
        for name, rows in source.contests.items()
        if name.split()[0] == start
    }
    if not chosen:
        raise ValueError(
            f"{source.title}: no contest of {', '.join(STEPS)}, but {', '.join(source.contests)}; "
            "run `pytest benchmarks/test_step.py`"
        )
    return chosen


def draw_panel(panel: "Axes", name: str, rows: Iterable[Row]) -> None:
    """Draw a bar a candidate, from 1 to its ratio."""
    rows = list(rows)
    for place, row in enumerate(rows):
        ours = row.candidate.startswith("ARS")
        colour = OURS if ours else THEIRS
        panel.barh(place, row.ratio - 1, left=1, color=colour, height=0.62)
        if row.ratio == 1:
            panel.plot([1], [place], "o", color=BASELINE, markersize=5)
        panel.annotate(
            f"{row.ms:.3g} ms" + ("" if row.ratio == 1 else f", x {row.ratio:.2f}"),
            (max(row.ratio, 1), place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    panel.axvline(1, color=BASELINE, linewidth=1)
    panel.set_xscale("log")
    panel.set_yticks(range(len(rows)), [row.candidate for row in rows], fontsize=8)
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        if row.candidate.startswith("ARS"):
            label.set_color(OURS)
    panel.invert_yaxis()
    panel.set_title(name, loc="left", fontsize=9)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(left=False)
    ticks = [0.1, 0.25, 0.5, 1, 2, 4, 8]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    panel.set_xticks([], minor=True)


def main() -> None:
    """Read the command line, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="JSON files or folders of them")
    parser.add_argument("--out", type=Path, default=OUT, help="the image (%(default)s)")
    options = parser.parse_args()
    try:
        draw([read(path) for path in options.sources or SOURCES], options.out)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(options.out)


if __name__ == "__main__":
    main()
