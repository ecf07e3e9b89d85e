"""Text from a trained model: the beginning that is given, continued token by token."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ars.models import GPT
from common.checkpoint_file import load_checkpoint
from common.errors import UsageError, understanding
from common.plain_files import read_json
from corpus.tokenizer import Tokenizer, load_tokenizer
from trainer.arguments import SampleArguments
from trainer.parallel import use_device
from trainer.series_run import CONFIG_FILE, TOKENIZER_FILE
from trainer.training_state import model_of

__all__ = ["continue_tokens", "describe_samples"]

_LEVELS = 3  # from checkpoints/d4-scratch/00000120.pt up to the folder of the run
_NEWLINE = b"\n"  # what a text begins after, for a tokenizer without a separator


def describe_samples(arguments: SampleArguments) -> str:
    """Continue a text; several samples get a title each.

    Args:
        arguments: of the command line.

    Raises:
        UsageError: the checkpoint or the device cannot be used.
    """
    texts = _samples(arguments)
    if len(texts) == 1:
        return f"{texts[0]}\n"
    titles = (f"--- sample {index + 1} of {len(texts)}" for index in range(len(texts)))
    return "".join(f"{title}\n{text}\n" for title, text in zip(titles, texts, strict=True))


def _samples(arguments: SampleArguments) -> list[str]:
    """The samples, each with the prompt.

    A sample ends early where the model ends the document. Bytes that are no UTF-8 are replaced.
    """
    use_device(arguments.device)
    model, tokenizer = _load(arguments.checkpoint)
    model.to(arguments.device)
    start = [tokenizer.separator] if tokenizer.separator is not None else []
    prompt = [*start, *tokenizer.encode(arguments.prompt).tolist()]
    if not prompt:
        prompt = tokenizer.encode(_NEWLINE).tolist()
    found = continue_tokens(
        model,
        prompt,
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        count=arguments.count,
    )
    texts = []
    for row in found.tolist():
        if tokenizer.separator in row:
            row = row[: row.index(tokenizer.separator)]
        continued = tokenizer.encode(arguments.prompt).tolist() + row
        texts.append(tokenizer.decode(continued).decode("utf-8", errors="replace"))
    return texts


@torch.no_grad()
def continue_tokens(
    model: GPT,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float,
    top_k: int | None = None,
    seed: int = 0,
    count: int = 1,
) -> Tensor:
    """Draw the tokens that follow a prompt, each given all before it as far as the model reads.

    Args:
        model: (B, T) int64 -> logits (B, T, V).
        prompt: one token or more.
        tokens: n, to draw.
        temperature: divides the logits; 0 takes the likeliest.
        top_k: draw from the k likeliest; ``None`` for all.
        seed: of the draws; each sample has draws of its own, however many there are.
        count: of samples.

    Returns:
        (count, n) int64, on the CPU.
    """
    device = next(model.parameters()).device
    text = torch.tensor([list(prompt)] * count, device=device)  # (count, T)
    draws = [_generator(seed, index) for index in range(count)]
    model.eval()
    for _ in range(tokens):
        logits = model(text[:, -model.config.sequence_len :])[:, -1].float().cpu()  # (count, V)
        if not logits.isfinite().all():
            raise UsageError(
                "the model gives no numbers, it diverged: name another with --checkpoint"
            )
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            # From the largest on, in double: dividing by any temperature overflows to -inf alone.
            scaled = (logits.double() - logits.amax(-1, keepdim=True)) / temperature
            chosen = _draw(scaled.float(), top_k, draws)
        text = torch.cat((text, chosen.to(device)), 1)
    return text[:, len(prompt) :].cpu()


def _generator(seed: int, index: int) -> torch.Generator:
    # A digest, because torch's generator looks at the last 32 bits of a seed alone.
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _draw(logits: Tensor, top_k: int | None, draws: Sequence[torch.Generator]) -> Tensor:
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    shares = logits.softmax(-1)
    rows = zip(shares, draws, strict=True)
    return torch.stack([row.multinomial(1, generator=generator) for row, generator in rows])


def _load(path: Path) -> tuple[GPT, Tokenizer]:
    if not os.path.isfile(path):
        raise UsageError(
            f"--checkpoint {path} does not exist or is no file: name a file of a run's checkpoints"
        )
    content = load_checkpoint(path, remedy="name another with --checkpoint")
    folder = _folder_of(path)
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    model = model_of(content, f"--checkpoint {path}", _sequence_len(folder / CONFIG_FILE))
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UsageError(
            f"--checkpoint {path} has {model.config.vocab_size} tokens, but the tokenizer of "
            f"{folder} has {tokenizer.vocab_size}: put the checkpoint back into its own run's "
            "folder"
        )
    return model, tokenizer


def _folder_of(path: Path) -> Path:
    for folder in path.absolute().parents[:_LEVELS]:
        if (folder / TOKENIZER_FILE).is_file() and (folder / CONFIG_FILE).is_file():
            return folder
    raise UsageError(
        f"--checkpoint {path} is not in the folder of a run, with {CONFIG_FILE} and "
        f"{TOKENIZER_FILE}: put it back there"
    )


def _sequence_len(path: Path) -> int:
    remedy = "restore it, it says what the model reads"
    content = read_json(path, remedy=remedy)
    with understanding(str(path), remedy):
        return int(content["settings"]["sequence_len"])
