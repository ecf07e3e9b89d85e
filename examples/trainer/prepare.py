"""From what the user asked for to a run that can start: every check, and nothing left behind."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from common.errors import UsageError
from common.output_folder import OutputFolder, check_writable
from common.plain_files import read_json
from common.program import QUIET_SECONDS, StopRequest
from corpus import Corpus, prepare_corpus
from trainer.parallel import Parallel, use_device
from trainer.planning import checked_plans, vocabulary_of
from trainer.run import CONFIG_FILE, DATA_FOLDER, Run
from trainer.series import check_folder
from trainer.tracking import check_tensorboard

if TYPE_CHECKING:  # the experiment has no such command line, nor needs its library
    from trainer.arguments import Arguments

__all__ = ["prepare"]


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
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    check_tensorboard(asked=machine.tensorboard)
    checked_plans(config, machine, vocabulary_of(arguments.tokenizer))
    parallel = Parallel(machine.device)
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
