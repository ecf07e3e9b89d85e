"""Models of a finished series, brought back for evaluation with the tokenizer of their run."""

from pathlib import Path

from tqdm import tqdm

from analysis.bundle import Task
from analysis.core import CoreResult, evaluate
from analysis.records import run_settings
from ars.models import GPT
from common.checkpoint_file import load_checkpoint
from common.errors import UsageError
from common.program import QUIET_SECONDS, drawing_interval
from corpus.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from trainer.series_run import CONFIG_FILE, TOKENIZER_FILE
from trainer.training_state import model_of

__all__ = ["beginning_token", "evaluate_checkpoint", "load_model"]

_LEVELS = 3  # from checkpoints/d4-scratch/00000120.pt up to the folder of the run


def load_model(path: Path, sequence_len: int | None) -> tuple[GPT, Tokenizer]:
    """The model in a checkpoint of ``examples/miniseries.py``, and its tokenizer.

    The tokenizer is the ``tokenizer.json`` of the run's folder. A model of 256 tokens needs none:
    only bytes are so few.

    Args:
        path: such as ``checkpoints/d4-grown.pt``.
        sequence_len: longest input that will be read; ``None`` for the training's own, which the
            ``config.json`` of the run's folder says and which is the longest sensible.

    Raises:
        UsageError: the file is damaged, holds no model of the miniseries, its tokenizer is missing
            or another, or the training's length is not known.
    """
    content = load_checkpoint(path, remedy="name a checkpoint of a finished run")
    length = _trained_len(path) if sequence_len is None else sequence_len
    model = model_of(content, str(path), length)
    return model, _tokenizer(path, model.config.vocab_size)


def beginning_token(tokenizer: Tokenizer) -> int:
    """What stands before a text: the separator of documents, or a line's end where there is none.

    Example:
        >>> beginning_token(ByteTokenizer())
        10
    """
    return int(tokenizer.encode(b"\n")[0]) if tokenizer.separator is None else tokenizer.separator


def evaluate_checkpoint(
    path: Path,
    tasks: list[Task],
    *,
    sequence_len: int | None,
    max_per_task: int | None,
    device: str = "cpu",
) -> CoreResult:
    """Evaluate a checkpoint on the tasks of a bundle.

    Args:
        path: see `load_model`.
        tasks: of the bundle.
        sequence_len: longest input in tokens; ``None`` for that of the training.
        max_per_task: items of each task at most; ``None`` for all.
        device: to evaluate on.

    Raises:
        UsageError: see `load_model` and `analysis.core.evaluate`.
    """
    model, tokenizer = load_model(path, sequence_len)
    bar = tqdm(
        total=sum(len(task.items[:max_per_task]) for task in tasks),
        desc=path.stem,
        unit=" items",
        delay=QUIET_SECONDS,
        mininterval=drawing_interval(),
        leave=False,
        dynamic_ncols=True,
    )

    def advance() -> None:
        bar.update()

    with bar:
        try:
            return evaluate(
                model.to(device),
                tasks,
                lambda text: tokenizer.encode(text).tolist(),
                bos=beginning_token(tokenizer),
                max_tokens=model.config.sequence_len,
                max_per_task=max_per_task,
                device=device,
                between=advance,
            )
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from None


def _of_the_run(path: Path, name: str) -> Path | None:
    files = (folder / name for folder in path.absolute().parents[:_LEVELS])
    return next((file for file in files if file.is_file()), None)


def _trained_len(path: Path) -> int:
    config = _of_the_run(path, CONFIG_FILE)
    runs = [] if config is None else run_settings([config])
    length = runs[0].get("settings", {}).get("sequence_len") if runs else None
    if not isinstance(length, int):
        raise UsageError(
            f"{path} has no config.json in its run's folder that says how long its sequences were: "
            "give --sequence-len"
        )
    return length


def _tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    file = _of_the_run(path, TOKENIZER_FILE)
    if file is None:
        if vocab_size == ByteTokenizer.vocab_size:
            return ByteTokenizer()
        raise UsageError(
            f"{path} has {vocab_size} tokens and no {TOKENIZER_FILE} in its run's folder: put the "
            "tokenizer there"
        )
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size != vocab_size:
        raise UsageError(
            f"{path} has {vocab_size} tokens, but the tokenizer of {file.parent} has "
            f"{tokenizer.vocab_size}: put the checkpoint back into its own run's folder"
        )
    return tokenizer
