"""One run: the series, where and with what it is trained; and from what the user asked for to it.

Every check comes before the text becomes tokens, and a run that is refused leaves nothing behind.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ars.atomic import is_unfinished
from common.errors import UsageError, understanding
from common.output_folder import LOCK_FILE, OutputFolder, check_writable
from common.plain_files import read_json
from common.program import QUIET_SECONDS, StopRequest
from corpus import Corpus, prepare_corpus
from corpus.tokenizer import vocabulary_of
from trainer.arms import parse_arm
from trainer.parallel import Parallel, use_device
from trainer.series_plan import ModelPlan, checked_plans
from trainer.settings import Machine, SeriesConfig

__all__ = [
    "CONFIG_FILE", "DATA_FOLDER", "TOKENIZER_FILE", "Run", "check_folder", "check_tensorboard",
    "prepare",
]  # fmt: skip

# In the output folder.
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
DATA_FOLDER = "data"  # the text as tokens, made before the run is begun
_BEFORE_CONFIG = (DATA_FOLDER, LOCK_FILE)  # what a kill can leave without CONFIG_FILE, with its own

_WIDE = 128  # channels from which several CPU threads pay


@dataclass(frozen=True)
class Run:
    """A series, and where and with what it is trained.

    Args:
        output: its folder.
        config: the settings.
        machine: device, memory and reporting.
        corpus: the data.
        parallel: this process among those of the run.
        stop: asked at every safe point.
    """

    output: OutputFolder
    config: SeriesConfig
    machine: Machine
    corpus: Corpus
    parallel: Parallel
    stop: StopRequest

    @property
    def folder(self) -> Path:
        """Output folder."""
        return self.output.path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def fingerprint(self, plan: ModelPlan) -> str:
        """Digest of what a state of this model depends on, to tell it from that of another run."""
        facts = [self.config.to_dict(), self.corpus.sha256, plan.name]
        return hashlib.sha256(json.dumps(facts, allow_nan=False).encode()).hexdigest()


def check_folder(folder: Path, config: SeriesConfig, corpus: Corpus | None) -> None:
    """See whether a run with these settings may use an output folder; write nothing.

    Args:
        folder: may or may not exist.
        config: the settings.
        corpus: the data; ``None`` where it is not known yet.

    Raises:
        UsageError: the folder holds something else, or a run with other settings or data.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: name a folder")
    stored_path = folder / CONFIG_FILE
    if not stored_path.exists():
        left = [path.name for path in folder.iterdir() if path.name not in _BEFORE_CONFIG]
        if not all(is_unfinished(name, CONFIG_FILE) for name in left):
            raise UsageError(
                f"--out {folder} holds files that are not a run of this program: "
                "name a new or empty folder"
            )
        return
    remedy = "delete the folder or name another with --out"
    stored = read_json(stored_path, remedy=remedy)
    with understanding(str(stored_path), remedy):
        settings, data_sha256 = dict(stored["settings"]), stored["data"]["sha256"]
    if not config.to_dict().keys() <= settings.keys():
        raise UsageError(
            f"{folder} holds a run of an earlier version, which this one cannot go on with: name "
            "another folder with --out"
        )
    changes = [
        f"{key} {settings.get(key)} (now {value})"
        for key, value in config.to_dict().items()
        if settings.get(key) != value
    ]
    if corpus is not None and data_sha256 != corpus.sha256:
        changes.append("other training data")
    if changes:
        raise UsageError(
            f"{folder} holds a run with {', '.join(changes)}: "
            "repeat its settings, name another folder with --out, or delete this one"
        )


def check_tensorboard(*, asked: bool) -> None:
    """See whether what is asked for is installed.

    Args:
        asked: whether event files are.

    Raises:
        UsageError: it is not.
    """
    if asked:
        try:
            import tensorboardX  # noqa: F401
        except ModuleNotFoundError:
            raise UsageError(
                "--tensorboard needs the package tensorboardX: pip install tensorboardX"
            ) from None


if TYPE_CHECKING:  # the experiment has no such command line, nor needs its library
    from trainer.arguments import Arguments


def prepare(arguments: "Arguments", stop: StopRequest, output: OutputFolder) -> Run:
    """Check the machine, the settings, the output folder and the data.

    What can be known without the text is looked at before it becomes tokens, which are all that is
    written. Where they go inside the output folder and something is wrong after all, they are taken
    away again.

    Args:
        arguments: of the command line.
        stop: asked while the text becomes tokens.
        output: the folder of ``arguments``; held from here on.

    Raises:
        RunInterruptedError: a signal arrived.
        UsageError: something cannot be used.
    """
    config, machine = arguments.config, arguments.machine
    use_device(machine.device)
    threads = machine.threads
    if threads is None and config.layers_and_width(config.depths[-1])[1] < _WIDE:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    check_tensorboard(asked=machine.tensorboard)
    _check_fsdp(config, machine)
    checked_plans(config, machine, vocabulary_of(arguments.tokenizer))
    parallel = Parallel(machine.device, fsdp=machine.fsdp)
    try:
        # By the first process, which alone writes: another could find what it has just written.
        parallel.from_first(lambda: _check_folders(arguments, output))
        with _nothing_left_behind(arguments, by=parallel.is_first):
            corpus = _read(arguments, parallel, stop)
            parallel.from_first(lambda: check_folder(arguments.out, config, corpus))
    except BaseException:
        parallel.close()
        raise
    return Run(
        output=output,
        config=config,
        machine=machine,
        corpus=corpus,
        parallel=parallel,
        stop=stop,
    )


def _check_fsdp(config: SeriesConfig, machine: Machine) -> None:
    """See whether the models of a run can be divided.

    Raises:
        UsageError: they are to be, and cannot.
    """
    if not machine.fsdp:
        return
    muon = next((arm for arm in config.arms if parse_arm(arm).has("muon")), None)
    if muon is not None:
        raise UsageError(
            f"--fsdp: {muon} has Muon, whose iterations need whole matrices: leave out one of them"
        )
    if machine.compile:
        raise UsageError("--fsdp and --compile do not go together here: leave out one of them")


def _check_folders(arguments: "Arguments", output: OutputFolder) -> None:
    check_writable(arguments.out)
    if arguments.cache is not None:
        check_writable(arguments.cache, "--cache")
    check_folder(arguments.out, arguments.config, None)
    output.hold()


def _read(arguments: "Arguments", parallel: Parallel, stop: StopRequest) -> Corpus:
    """The text as tokens: the first process makes them, the others find them."""

    def read(commit: str | None) -> Corpus:
        with _bar(stop, shown=parallel.is_first) as progress:
            return prepare_corpus(
                _at(arguments.data, commit),
                column=arguments.column,
                tokenizer=arguments.tokenizer,
                cache=arguments.cache or arguments.out / DATA_FOLDER,
                sequence_len=arguments.config.sequence_len,
                progress=progress,
                between=stop.check,
            )

    made: list[Corpus] = []

    def read_first() -> str | None:
        made.append(read(_commit_of_the_run(arguments)))
        commit: str | None = made[0].facts.get("commit")
        return commit

    commit = parallel.from_first(read_first)
    return made[0] if made else read(commit)


def _commit_of_the_run(arguments: "Arguments") -> str | None:
    """That of the hub's data set which the run in the output folder was begun with.

    With it the run goes on without a network, and whatever the hub has become.
    """
    path = arguments.out / CONFIG_FILE
    if not path.exists():
        return None
    # `check_folder` has read it.
    data = read_json(path, remedy="delete the folder or name another with --out")["data"]
    commit: str | None = data.get("commit") if data.get("source") == arguments.data else None
    return commit


def _at(data: str | None, commit: str | None) -> str | None:
    """A data set's name with a commit, unless it has one or there is none."""
    return data if data is None or commit is None or "@" in data else f"{data}@{commit}"


@contextmanager
def _bar(stop: StopRequest, *, shown: bool) -> Iterator[Callable[[int, int | None], None]]:
    with tqdm(
        desc="tokens", unit="B", unit_scale=True, delay=QUIET_SECONDS, leave=False,
        disable=not shown,
    ) as bar:  # fmt: skip

        def show(done: int, size: int | None) -> None:
            stop.check()
            bar.total = size
            bar.update(done - bar.n)

        yield show


@contextmanager
def _nothing_left_behind(arguments: "Arguments", *, by: bool) -> Iterator[None]:
    """Take away what a refused run has put into its output folder; a folder of --cache stays."""
    cache = arguments.out / DATA_FOLDER
    before = set(cache.iterdir()) if cache.is_dir() else set()
    made = [path for path in (cache, *cache.parents) if not path.exists()]
    try:
        yield
    except UsageError:
        if by and arguments.cache is None:
            for path in set(cache.iterdir()) - before if cache.is_dir() else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        raise
