"""From what the user asked for to a run that can start: every check, and nothing left behind."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from corpus import Corpus, prepare_corpus
from trainer.cli import Arguments
from trainer.errors import UsageError
from trainer.parallel import Parallel
from trainer.planning import checked_plans, vocabulary_of
from trainer.run import Run
from trainer.series import DATA_FOLDER, check_folder
from trainer.signals import StopRequest
from trainer.tracking import check_trackers

__all__ = ["check_writable", "prepare", "use_device"]

_QUIET_SECONDS = 1.0  # tokenising that takes less is not worth a progress bar


def prepare(arguments: Arguments, stop: StopRequest) -> Run:
    """Check the machine, the settings, the output folder and the data.

    What can be known without the text is looked at before it becomes tokens, which are all that is
    written. Where they go inside the output folder and something is wrong after all, they are taken
    away again.

    Args:
        arguments: of the command line.
        stop: asked while the text becomes tokens.

    Raises:
        RunInterruptedError: a signal arrived.
        UsageError: something cannot be used.
    """
    config, machine = arguments.config, arguments.machine
    use_device(machine.device)
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    check_trackers(tensorboard=machine.tensorboard, wandb=machine.wandb is not None)
    checked_plans(config, machine, vocabulary_of(arguments.tokenizer))
    parallel = Parallel(machine.device)
    try:
        # By the first process, which alone writes: another could find what it has just written.
        parallel.from_first(lambda: _check_folders(arguments))
        with _nothing_left_behind(arguments, by=parallel.is_first):
            corpus = _read(arguments, parallel, stop)
            parallel.from_first(lambda: check_folder(arguments.out, config, corpus))
    except BaseException:
        parallel.close()
        raise
    return Run(
        folder=arguments.out,
        config=config,
        machine=machine,
        corpus=corpus,
        parallel=parallel,
        stop=stop,
    )


def _check_folders(arguments: Arguments) -> None:
    check_writable(arguments.out)
    if arguments.cache is not None:
        check_writable(arguments.cache, "--cache")
    check_folder(arguments.out, arguments.config, None)


def _read(arguments: Arguments, parallel: Parallel, stop: StopRequest) -> Corpus:
    """The text as tokens: the first process makes them, the others find them."""

    def read() -> Corpus:
        with _bar(stop, shown=parallel.is_first) as progress:
            return prepare_corpus(
                arguments.data,
                column=arguments.column,
                tokenizer=arguments.tokenizer,
                cache=arguments.cache or arguments.out / DATA_FOLDER,
                sequence_len=arguments.config.sequence_len,
                progress=progress,
            )

    made: list[Corpus] = []
    parallel.from_first(lambda: made.append(read()))
    return made[0] if made else read()


@contextmanager
def _bar(stop: StopRequest, *, shown: bool) -> Iterator[Callable[[int, int | None], None]]:
    with tqdm(
        desc="tokens", unit="B", unit_scale=True, delay=_QUIET_SECONDS, leave=False,
        disable=not shown,
    ) as bar:  # fmt: skip

        def show(done: int, size: int | None) -> None:
            stop.check()
            bar.total = size
            bar.update(done - bar.n)

        yield show


@contextmanager
def _nothing_left_behind(arguments: Arguments, *, by: bool) -> Iterator[None]:
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


def use_device(name: str) -> None:
    """Check that a device is there, for every process that torchrun has started here.

    Args:
        name: "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: it is unknown or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is unknown: use cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"--device {name} is not available (CUDA devices found: {count}): use --device cpu"
            )
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if processes > 1 and device.index is not None:
            raise UsageError(
                f"--device {name} is one for {processes} processes: use --device cuda, of which "
                "each takes its own"
            )
        if processes > count:
            raise UsageError(
                f"--device {name} has {count} for {processes} processes: start at most {count}"
            )


def check_writable(folder: Path, option: str = "--out") -> None:
    """Check that a folder exists or can be created, and may be written to.

    Args:
        folder: nothing is written to it.
        option: that named it.

    Raises:
        UsageError: it cannot be.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(
            f"{option} {folder} cannot be created, {existing} is a file: name a folder"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder} is not writable: name a folder you may write to")
