"""From what the user asked for to a run that can start: every check, and no write."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from trainer.cli import Arguments
from trainer.config import SeriesConfig
from trainer.data import Corpus, load_file, load_standard_library
from trainer.errors import UsageError
from trainer.series import check_folder
from trainer.state import steps_for_ratio

__all__ = ["check_writable", "prepare"]


def prepare(arguments: Arguments) -> tuple[SeriesConfig, Corpus]:
    """Check the machine, the data and the output folder.

    Args:
        arguments: of the command line.

    Raises:
        UsageError: one of them cannot be used.
    """
    config = arguments.config
    _use_device(config.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.ratio is not None:
        config = replace(config, steps=steps_for_ratio(config, arguments.ratio))
    check_writable(arguments.out)
    if arguments.data is None:
        corpus = load_standard_library()
    else:
        corpus = load_file(arguments.data, config.sequence_len)
    check_folder(arguments.out, config, corpus)
    return config, corpus


def _use_device(name: str) -> None:
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


def check_writable(folder: Path) -> None:
    """Check that an output folder exists or can be created, and may be written to.

    Args:
        folder: nothing is written to it.

    Raises:
        UsageError: it cannot be.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"--out {folder} cannot be created, {existing} is a file: name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder} is not writable: name a folder you may write to")
