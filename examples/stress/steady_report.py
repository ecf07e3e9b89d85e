"""What the runs with faults say: one table, one picture, and who is beaten by whom.

Every run is held against two undisturbed runs of its network and seed: its own arm's, and AdamW's.
A loss above 8 bits per byte, or one that is not finite, counts as 8: guessing costs no more.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm

from ars.atomic import replacing
from common.plain_files import write_atomically
from common.statistics import Estimate, count_seeds, share_interval
from common.tables import markdown
from corpus import Corpus
from stress.compared_optimizers import arm_named
from stress.faults import FAULTS
from stress.networks import NETWORKS, network_settings
from stress.steady_options import COLUMNS, GRIDS, OURS, ROWS, control_of
from stress.stress_run import Job, Record

__all__ = ["choose", "draw", "measures", "summarize", "tables", "write_comparison", "write_tuning"]

Times = Mapping[str, Mapping[str, Mapping[str, float]]]  # network -> arm -> of a step

_GUESSING = 8.0  # bits per byte
_LOST_BY = 1.0  # bits per byte above AdamW's undisturbed run
_RECOVERED_WITHIN = 0.1  # bits per byte above the own undisturbed run at the same step
_TITLES = {"ordinary": "nothing happens", "edge": "rate x 100"}
_SHORT_TITLES = {
    "adamw": "AdamW", "adamw-clip": "clip", "low-beta2": "low b2", "stableadamw": "Stable",
    "skip": "skip", "default": "ours", "default-max-norm": "ours, clip", "default-400": "ours 400",
}  # fmt: skip
_AVERAGED = ("final", "above_own", "above_adamw", "peak_loss", "peak_norm", "recovered")
_LONG = (
    "network", "fault", "arm", "lost [95 %]", "above own", "above AdamW", "peak loss", "peak norm",
    "recovered after",
)  # fmt: skip


def _title(row: str) -> str:
    return _TITLES.get(row) or FAULTS[row].title


def _short(arm: str) -> str:
    return _SHORT_TITLES.get(arm) or arm_named(arm).title


def _bits(value: float | None) -> float:
    return _GUESSING if value is None or not value <= _GUESSING else float(value)


def measures(jobs: Sequence[Job], records: Sequence[Record]) -> pd.DataFrame:
    """A row a run.

    Columns: ``network``, ``scenario``, ``arm``, ``seed``; ``final``, the validation at the end;
    ``above_own`` and ``above_adamw``, how far it is above the undisturbed runs; ``lost``, whether
    that is more than 1 bit per byte above AdamW's; ``peak_loss``, the highest validation, and
    ``peak_norm``, the highest norm of the weights relative to the start, both from the begin of the
    fault on; ``recovered``, the steps after which the validation stays within 0.1 bits of the own
    undisturbed run, all that are left if it never does.

    Args:
        jobs: what was run, with the undisturbed runs.
        records: one a job.
    """
    found = {
        (job.network, job.scenario, job.arm, job.seed): record
        for job, record in zip(jobs, records, strict=True)
    }
    rows = []
    for (network, scenario, arm, seed), record in found.items():
        control = control_of(scenario)
        own = found[network, control, arm, seed]
        adamw = found[network, control, "adamw", seed]
        half = record["identity"]["size"]["steps"] // 2
        begins = half if _begins_half_way(scenario) else 0
        final = _bits(record["metrics"]["final"])
        above = final - _bits(adamw["metrics"]["final"])
        curves = record["curves"]
        late = [v for t, v in zip(curves["times"], curves["validation"], strict=True) if t > begins]
        norms = [math.inf if norm is None else norm for norm in curves["norm"][begins:]]
        rows.append({
            "network": network, "scenario": scenario, "arm": arm, "seed": seed, "final": final,
            "above_own": final - _bits(own["metrics"]["final"]), "above_adamw": above,
            "lost": above > _LOST_BY, "peak_loss": max(map(_bits, late)), "peak_norm": max(norms),
            "recovered": _recovered(curves, own["curves"], begins),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _begins_half_way(scenario: str) -> bool:
    fault = FAULTS.get(scenario)
    return fault is None or bool(fault.data or fault.rate != 1.0 or fault.forgets)


def _recovered(curves: Mapping[str, Any], own: Mapping[str, Any], begins: int) -> int:
    times = curves["times"]
    since = times[-1]
    points = [*zip(times, curves["validation"], own["validation"], strict=True)]
    for time, mine, theirs in reversed(points):
        if time <= begins:
            break
        if not _bits(mine) <= _bits(theirs) + _RECOVERED_WITHIN:
            return since - begins
        since = time
    return 0


def summarize(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One row for each network, fault and arm: means over the seeds, half of their 95 % intervals.

    Args:
        frame: of `measures`.
    """
    rows = []
    groups = dict(iter(frame.groupby(["network", "scenario", "arm"], sort=False)))
    for key in product(NETWORKS, ROWS, COLUMNS):
        if (runs := groups.get(key)) is None:
            continue
        lost = int(runs["lost"].sum())
        row: dict[str, Any] = dict(zip(("network", "scenario", "arm"), key, strict=True))
        row |= {
            "runs": len(runs), "lost": lost, "lost_interval": share_interval(lost, len(runs)),
        }  # fmt: skip
        for name in _AVERAGED:
            finite = [value for value in runs[name].tolist() if math.isfinite(value)]
            estimate = Estimate.of(finite) if finite else None
            row[name] = None if estimate is None else (estimate.mean, estimate.margin)
        rows.append(row)
    return rows


def beaten(frame: pd.DataFrame) -> list[tuple[str, str, str, str, Estimate]]:
    """Where a peer is better than one of ours by more than its interval: the best such peer.

    Args:
        frame: of `measures`.

    Returns:
        Network, our arm, fault, peer, and how much lower the peer's final loss is, paired by seed.
    """
    finals = {
        (str(network), str(scenario), str(arm)): runs.set_index("seed")["final"]
        for (network, scenario, arm), runs in frame.groupby(["network", "scenario", "arm"])
    }
    found = []
    for network, ours, row in product(NETWORKS, OURS, ROWS):
        if (network, row, ours) not in finals:
            continue
        better = []
        for peer in COLUMNS:
            if peer in OURS or (network, row, peer) not in finals:
                continue
            gap = (finals[network, row, ours] - finals[network, row, peer]).dropna()
            estimate = Estimate.of(gap.tolist())
            if estimate.known is not None and estimate.known[0] > 0:
                better.append((estimate.mean, peer, estimate))
        if better:
            _, peer, estimate = max(better, key=lambda each: each[0])
            found.append((network, ours, row, peer, estimate))
    return found


def tables(frame: pd.DataFrame, times: Times) -> str:
    """All that is said in words: the tables, what is given up, who is beaten, and every measure.

    Args:
        frame: of `measures`.
        times: network -> arm -> "milliseconds" and "ratio" of a step.
    """
    rows = summarize(frame)
    seeds = frame["seed"].nunique()
    free: list[Sequence[str]] = [
        ("network", "arm", "final bits", "given up, %", "ms a step", "ratio")
    ]
    free += [
        _free(row, frame, times[row["network"]][row["arm"]])
        for row in rows
        if row["scenario"] == "ordinary"
    ]
    lost = [("network", "ours", "fault", "better peer", "by, bits per byte")]
    lost += [
        (NETWORKS[network].title, _short(ours), _title(row), _short(peer), by.plus_minus(".3f"))
        for network, ours, row, peer, by in beaten(frame)
    ]
    enough = "None." if seeds >= 3 else "Too few seeds to say: three are needed."
    grids = "\n\n".join(f"**{title}**\n\n{grid}" for title, grid in _grids(rows))
    return f"""\
### What each fault costs

Final validation, bits per byte above undisturbed AdamW: mean of {count_seeds(seeds)}. Behind a
slash stands how many runs are lost: more than {_LOST_BY:g} bit above it.

{grids}

### When nothing happens

{markdown(free, "llr")}

### Where a peer is better by more than its interval

{markdown(lost, "llllr") if len(lost) > 1 else enough}

### Every measure

{markdown([_LONG, *map(_course, rows)], "lllr")}
"""


def _by_network(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[str, str], Any]]:
    """Network -> (scenario, arm) -> row, all in the order of the tables."""
    found: dict[str, dict[tuple[str, str], Any]] = {}
    for row in rows:
        found.setdefault(row["network"], {})[row["scenario"], row["arm"]] = row
    return found


def _axes_of(cells: Mapping[tuple[str, str], Any]) -> tuple[list[str], list[str]]:
    scenarios, arms = zip(*cells, strict=True)
    return [*dict.fromkeys(scenarios)], [*dict.fromkeys(arms)]


def _grids(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for network, cells in _by_network(rows).items():
        scenarios, arms = _axes_of(cells)
        grid = [["fault", *map(_short, arms)]]
        grid += [[_title(s), *(_cell(cells[s, arm]) for arm in arms)] for s in scenarios]
        yield NETWORKS[network].title, markdown(grid, "lr")


def _cell(row: Mapping[str, Any]) -> str:
    above = row["above_adamw"][0]
    return f"{above:.1f}/{row['lost']}" if row["lost"] else f"{round(above, 2) + 0.0:.2f}"


def _free(
    row: Mapping[str, Any], frame: pd.DataFrame, times: Mapping[str, float]
) -> tuple[str, ...]:
    network, arm = row["network"], row["arm"]
    plain = frame[(frame["network"] == network) & (frame["scenario"] == "ordinary")].pivot(
        index="seed", columns="arm", values="final"
    )
    share = Estimate.of((100 * (plain[arm] / plain["adamw"] - 1)).tolist())
    final = _plus_minus(row["final"], ".3f")
    milliseconds, ratio = f"{times['milliseconds']:.1f}", f"{times['ratio']:.2f}"
    given_up = share.plus_minus("+.2f")
    return NETWORKS[network].title, arm_named(arm).title, final, given_up, milliseconds, ratio


def _course(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["lost_interval"]
    return (
        NETWORKS[row["network"]].title,
        _title(row["scenario"]),
        _short(row["arm"]),
        f"{row['lost']} [{low:.0%}, {high:.0%}]",
        _plus_minus(row["above_own"], "+.3f"),
        _plus_minus(row["above_adamw"], "+.3f"),
        _plus_minus(row["peak_loss"], ".2f"),
        _plus_minus(row["peak_norm"], ".2f"),
        _plus_minus(row["recovered"], ".0f"),
    )


def _plus_minus(value: tuple[float, float | None] | None, form: str) -> str:
    if value is None:
        return "not finite"
    mean, margin = value
    return f"{mean:{form}}" + ("" if margin is None else f" ± {margin:{form.lstrip('+')}}")


def draw(path: Path, frame: pd.DataFrame) -> None:
    """Draw the tables, one below the other: faults down, arms across, brighter the more is lost.

    Args:
        path: of the picture.
        frame: of `measures`.
    """
    networks = _by_network(summarize(frame))
    heights = [len(_axes_of(cells)[0]) for cells in networks.values()]
    arms = len(_axes_of(next(iter(networks.values())))[1])
    figure, grid = plt.subplots(
        len(networks),
        figsize=(2.9 + 0.85 * arms, 1.9 + 0.34 * sum(heights) + 0.2 * len(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    # Cividis is read alike by all kinds of colour vision. Below 0.03 bits all look alike.
    norm = LogNorm(0.03, 5.0, clip=True)
    for number, (network, cells) in enumerate(networks.items()):
        image = _draw_cells(grid[number, 0], cells, norm, named=number == 0)
        grid[number, 0].set_ylabel(NETWORKS[network].title, fontsize=9, fontweight="bold")
    bar = figure.colorbar(
        image, ax=grid, ticks=[0.03, 0.1, 0.3, 1, 3], pad=0.02, aspect=30, shrink=0.8
    )
    bar.ax.set_yticklabels(["0.03 or less", "0.1", "0.3", "1", "3"])
    bar.set_label("bits per byte above undisturbed AdamW / runs lost")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)


def _draw_cells(
    axes: Any, cells: Mapping[tuple[str, str], Any], norm: LogNorm, *, named: bool
) -> Any:
    scenarios, arms = _axes_of(cells)
    values = np.array([[cells[s, arm]["above_adamw"][0] for arm in arms] for s in scenarios])
    image = axes.imshow(np.maximum(values, 0.03), norm=norm, cmap="cividis", aspect="auto")
    for at, scenario in enumerate(scenarios):
        for across, arm in enumerate(arms):
            text = _cell(cells[scenario, arm])
            bright = norm(max(values[at, across], 0.03)) > 0.55
            axes.text(
                across, at, text, ha="center", va="center", fontsize=8,
                color="black" if bright else "white",
            )  # fmt: skip
    titles = [arm_named(arm).title for arm in arms] if named else []
    axes.set_xticks(range(len(titles)), titles, rotation=35)
    for label in axes.get_xticklabels():
        label.set(horizontalalignment="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(scenarios)), [_title(name) for name in scenarios])
    axes.tick_params(length=0, labelsize=9)
    ours = [at for at, arm in enumerate(arms) if arm in OURS]
    if ours and ours[0]:
        axes.axvline(ours[0] - 0.5, color="white", linewidth=2)
    return image


def write_comparison(
    folder: Path,
    jobs: Sequence[Job],
    records: Sequence[Record],
    corpus: Corpus,
    command: str,
    times: Times,
) -> str:
    """Write ``steady.json``, ``runs.csv``, ``tables.md`` and ``steady.png``.

    Args:
        folder: output folder.
        jobs: what was run.
        records: one a job.
        corpus: the text.
        command: that was given, to be recorded.
        times: network -> arm -> "milliseconds" and "ratio" of a step.

    Returns:
        The text of ``tables.md``.
    """
    frame = measures(jobs, records)
    text = tables(frame, times)
    draw(folder / "steady.png", frame)
    write_atomically(folder / "tables.md", text)
    write_atomically(folder / "runs.csv", frame.to_csv(index=False, lineterminator="\n"))
    content = {
        **_origin(jobs, records, corpus, command),
        "arms": {r["identity"]["arm"]: r["identity"]["update"] for r in records},
        "faults": {
            r["identity"]["scenario"]: r["identity"]["fault"]
            for r in records
            if "fault" in r["identity"]
        },
        "networks": {network: network_settings(network) for network in times},
        "times": times,
        "rows": summarize(frame),
        "beaten": [
            {
                "network": network,
                "ours": ours,
                "scenario": row,
                "peer": peer,
                "by": [found.mean, found.margin],
            }
            for network, ours, row, peer, found in beaten(frame)
        ],
    }
    write_atomically(folder / "steady.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return text


def _origin(
    jobs: Sequence[Job], records: Sequence[Record], corpus: Corpus, command: str
) -> dict[str, Any]:
    return {
        "command": command,
        "torch": str(torch.__version__),
        "corpus": {**corpus.facts, "sha256": corpus.sha256},
        "size": records[0]["identity"]["size"],
        "seeds": sorted({job.seed for job in jobs}),
    }


def choose(jobs: Sequence[Job], records: Sequence[Record]) -> list[dict[str, Any]]:
    """The settings of each arm and their scores, the best of a network's arm marked ``chosen``.

    A score is the mean over the scenarios of the mean final validation over the seeds. Of equal
    scores the first of the grid is chosen.

    Args:
        jobs: of `Options.tuning_jobs`.
        records: one a job.
    """
    finals: dict[tuple[str, str, Any], dict[str, list[float]]] = {}
    for job, record in zip(jobs, records, strict=True):
        of_setting = finals.setdefault((job.network, job.arm, job.changes), {})
        of_setting.setdefault(job.scenario, []).append(_bits(record["metrics"]["final"]))
    rows: list[dict[str, Any]] = []
    for (network, arm, changes), by_scenario in finals.items():
        score = float(np.mean([np.mean(values) for values in by_scenario.values()]))
        rows.append({
            "network": network, "arm": arm, "settings": dict(changes), "score": score,
            "finals": by_scenario,
        })  # fmt: skip
    for key in dict.fromkeys((row["network"], row["arm"]) for row in rows):
        tried = [row for row in rows if (row["network"], row["arm"]) == key]
        min(tried, key=lambda row: row["score"])["chosen"] = True
    return [{"chosen": False, **row} for row in rows]


def write_tuning(
    folder: Path, jobs: Sequence[Job], records: Sequence[Record], corpus: Corpus, command: str
) -> str:
    """Write ``tuning.json``: all scores, and what is chosen.

    Args:
        folder: output folder.
        jobs: of `Options.tuning_jobs`.
        records: one a job.
        corpus: the text.
        command: that was given, to be recorded.

    Returns:
        A table of the scores.
    """
    rows = choose(jobs, records)
    chosen: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["chosen"]:
            chosen.setdefault(row["network"], {})[row["arm"]] = row["settings"]
    content = _origin(jobs, records, corpus, command) | {"chosen": chosen, "rows": rows}
    write_atomically(folder / "tuning.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    scenarios = [*dict.fromkeys(job.scenario for job in jobs)]
    table: list[Sequence[str]] = [
        ("network", "arm", "settings", *map(_title, scenarios), "score", "")
    ]
    for row in rows:
        named = ", ".join(f"{name} {row['settings'][name]:g}" for name in GRIDS[row["arm"]])
        means = [f"{np.mean(row['finals'][name]):.3f}" for name in scenarios]
        mark = "chosen" if row["chosen"] else ""
        titles = NETWORKS[row["network"]].title, arm_named(row["arm"]).title
        table.append((*titles, named, *means, f"{row['score']:.3f}", mark))
    return markdown(table, "lllr") + "\n"
