"""All runs, one after another; each is on disk when it is done, and is never done twice."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from continual.config import Run, Settings
from continual.data import load
from continual.train import run_tasks
from trainer.bars import drawing_interval
from trainer.checkpoint import write_atomically
from trainer.errors import UsageError
from trainer.folder import LOCK_FILE, OutputFolder
from trainer.reading import read_json, understanding
from trainer.signals import StopRequest

__all__ = ["RESULTS", "check_folder", "run_all"]

RESULTS = "results.json"

Record = dict[str, Any]


def check_folder(folder: Path, settings: Settings) -> list[Record]:
    """Read what an earlier call has left in the output folder, without writing anything.

    Args:
        folder: output folder; it need not exist.
        settings: of the runs to come.

    Returns:
        The records of the runs that are done.

    Raises:
        UsageError: the folder holds other things, damaged results, or results of other settings.
    """
    path = folder / RESULTS
    if not path.exists():
        if folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
            raise UsageError(f"--out {folder} is not a run of this program: name another folder")
        return []
    remedy = "delete it or name another folder with --out"
    content = read_json(path, remedy=remedy)
    with understanding(str(path), remedy):
        records = [dict(record) for record in content["runs"]]
        found = dict(content["settings"])
        _ = [_run_of(record) for record in records], [record["accuracy"] for record in records]
    wanted = settings.to_dict()
    different = [
        f"{key} {found.get(key)} (now {value})"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if different:
        raise UsageError(
            f"{path} is of other settings: {', '.join(different)}; name another folder with --out"
        )
    return records


def run_all(
    output: OutputFolder,
    settings: Settings,
    runs: Sequence[Run],
    done: Sequence[Record],
    stop: StopRequest,
) -> list[Record]:
    """Do the runs that are not done yet.

    Args:
        output: folder, held; it gets ``results.json`` after every run.
        settings: of all runs.
        runs: what is wanted.
        done: records of earlier calls, as `check_folder` returned them.
        stop: asked after every epoch.

    Returns:
        The records of ``runs``, in their order.

    Raises:
        RunInterruptedError: a signal has arrived; what was done before is on disk.
    """
    records = {_run_of(record): record for record in done}
    todo = [run for run in runs if run not in records]
    if todo:
        digits = load(validation=settings.validation)
        epochs = sum(run.tasks for run in todo) * settings.epochs
        interval = drawing_interval()
        with tqdm(
            total=epochs, unit="epoch", mininterval=interval, maxinterval=2 * interval,
            dynamic_ncols=True,
        ) as bar:  # fmt: skip

            def tick() -> None:
                bar.update()
                stop.check()

            for run in todo:
                bar.set_description(run.title, refresh=False)
                records[run] = run_tasks(run, settings, digits, tick)
                content = {"settings": settings.to_dict(), "runs": list(records.values())}
                output.check()
                write_atomically(output.path / RESULTS, _to_json(content))
    return [records[run] for run in runs]


def _run_of(record: Record) -> Run:
    return Run(record["method"], record["strength"], record["tasks"], record["seed"])


def _to_json(content: dict[str, Any]) -> str:
    """One line a run, so that the file can be read and compared."""
    runs = ",\n".join(
        f"    {json.dumps(_rounded(run), allow_nan=False)}" for run in content["runs"]
    )
    settings = json.dumps(content["settings"], allow_nan=False)
    return f'{{\n  "settings": {settings},\n  "runs": [\n{runs}\n  ]\n}}\n'


def _rounded(record: Record) -> Record:
    rows = [[round(value, 4) for value in row] for row in record["accuracy"]]
    return record | {"accuracy": rows}
