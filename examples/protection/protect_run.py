"""The runs of the protection's program, one after another or several at a time, and their report.

First the model of each seed, which all methods begin with; then the methods.
"""

import json
import pydoc_data.topics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import UsageError, understanding
from common.jobs import changed_settings, run_jobs
from common.output_folder import LOCK_FILE, OutputFolder
from common.plain_files import read_json, write_atomically
from common.program import StopRequest
from corpus import Corpus, prepare_corpus
from protection.protect_options import Options
from protection.protect_results import write_report
from protection.second_training import (
    BASE,
    Run,
    Texts,
    has_models,
    run_method,
    train_first,
)

__all__ = ["check_folder", "run_all"]

_RESULTS = "results.json"
_MODELS = "models"
_TOKENS = ("tokens-first", "tokens-second")
# English about Python, beside the source of Python: in every installation.
_REFERENCE = pydoc_data.topics.__file__

Record = dict[str, Any]


def run_all(options: Options) -> str:
    """Do the runs that are not done yet, and write the report.

    Args:
        options: what to do, and where.

    Returns:
        What to tell the user.

    Raises:
        RunInterruptedError: a signal arrived; what was done before is on disk.
        UsageError: a text or the folder cannot be used, or a run failed.
    """
    out = options.folder
    check_folder(out, None)
    with OutputFolder(out) as output, StopRequest() as stop:
        output.hold()
        texts = _texts(options, stop)
        facts = {**options.settings.to_dict(), "texts": [text.sha256 for text in texts]}
        records = check_folder(out, facts)
        models = out / _MODELS
        models.mkdir(exist_ok=True)

        def keep(run: Run, record: Record) -> None:
            before = records.setdefault(run, record)
            if before["points"] != record["points"]:
                raise UsageError(
                    f"{models} lacked models, and trained again they are others than those of "
                    f"{_RESULTS}: name another folder with --out"
                )
            output.check()
            write_atomically(out / _RESULTS, _to_json(facts, records))

        wanted: list[Run] = []
        for work, runs in ((train_first, options.first_runs), (run_method, options.runs)):
            wanted += runs
            todo = [run for run in runs if run not in records or not has_models(run, models)]
            do = partial(work, settings=options.settings, texts=texts, models=models)
            if todo:
                done = len(runs) - len(todo)
                run_jobs(todo, do, keep, stop, workers=options.workers, done=done)
        wanted_records = [records[run] for run in wanted]
        table = write_report(out, wanted_records, options.settings.fisher_samples)
        output.check()
    return f"{table}\nResults are in {out}: {_RESULTS}, table.md and figures.\n"


def check_folder(folder: Path, facts: Mapping[str, Any] | None) -> dict[Run, Record]:
    """Read what an earlier call has left in the output folder, without writing anything.

    Args:
        folder: output folder; it need not exist.
        facts: settings of the runs to come and digests of their texts; ``None``: not known yet.

    Returns:
        The records of the runs that are done.

    Raises:
        UsageError: the folder holds other things, damaged results, or results of other settings.
    """
    path = folder / _RESULTS
    if not path.exists():
        own = {LOCK_FILE, _MODELS, *_TOKENS}
        if folder.is_dir() and any(each.name not in own for each in folder.iterdir()):
            raise UsageError(f"--out {folder} is not a run of this program: name another folder")
        return {}
    remedy = "delete it or name another folder with --out"
    content = read_json(path, remedy=remedy)
    with understanding(str(path), remedy):
        found = dict(content["settings"])
        records = {_run_of(record): dict(record) for record in content["runs"]}
        for run, record in records.items():
            points = [*record["points"], *([record["before"]] if run.method == BASE else [])]
            _ = [0.0 + (point[text] or 0.0) for point in points for text in ("first", "second")]
    if facts is not None and (different := changed_settings(found, dict(facts))):
        raise UsageError(
            f"{path} is of other settings: {', '.join(different)}; name another folder with --out"
        )
    return records


def _texts(options: Options, stop: StopRequest) -> Texts:
    def prepared(source: str | None, name: str) -> Corpus:
        return prepare_corpus(
            source,
            cache=options.folder / name,
            sequence_len=options.settings.sequence_len,
            progress=lambda *_: stop.check(),
            between=stop.check,
        )

    second = _REFERENCE if options.second is None else options.second
    return prepared(options.first, _TOKENS[0]), prepared(second, _TOKENS[1])


def _run_of(record: Record) -> Run:
    return Run(str(record["method"]), float(record["strength"]), int(record["seed"]))


def _to_json(facts: Mapping[str, Any], records: Mapping[Run, Record]) -> str:
    """One line a run, so that the file can be read and compared."""
    runs: Sequence[str] = [
        f"    {json.dumps(record, allow_nan=False)}" for record in records.values()
    ]
    lines = ",\n".join(runs)
    return (
        f'{{\n  "settings": {json.dumps(facts, allow_nan=False)},\n  "runs": [\n{lines}\n  ]\n}}\n'
    )
