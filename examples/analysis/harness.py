"""A checkpoint as a model of EleutherAI's lm-evaluation-harness, which is optional.

    pip install lm_eval

    import lm_eval
    from analysis.harness import harness_model        # with examples/ on the path

    model = harness_model(Path("out/run/checkpoints/d4-grown.pt"), sequence_len=256)
    lm_eval.simple_evaluate(model, tasks=["my_task"], task_manager=manager)

The tasks that come with it download their data. Without a network, write tasks of your own, with
``dataset_path: json`` and ``dataset_kwargs: {data_files: {test: my_items.jsonl}}``, into a folder,
take ``manager = lm_eval.tasks.TaskManager(include_path=folder)``, and set HF_DATASETS_OFFLINE=1 and
HF_HUB_OFFLINE=1. Its multiple choice sums log-probabilities, so its numbers are not CORE.

Every text begins with the token that begins texts in training. A context that does not fit loses
its beginning; a text to be scored that does not fit is scored window by window, every token once.
"""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.checkpoints import beginning_token, load_model
from ars.models import GPT
from corpus.tokenizer import Tokenizer
from trainer.errors import UsageError

__all__ = ["Scorer", "harness_model"]

_SEED = 1234  # of sampling, where a task asks for it
_MOST_GENERATED = 256  # tokens, where a task does not say


def harness_model(
    path: Path, *, sequence_len: int, batch_size: int = 16, device: str = "cpu"
) -> Any:
    """The checkpoint as an ``lm_eval.api.model.TemplateLM``.

    Args:
        path: see `analysis.checkpoints.load_model`.
        sequence_len: longest input in tokens.
        batch_size: sequences at a time.
        device: to run on.

    Raises:
        UsageError: ``lm_eval`` is not installed, or see `analysis.checkpoints.load_model`.
    """
    try:
        base: Any = importlib.import_module("lm_eval.api.model").TemplateLM
    except ModuleNotFoundError as error:
        raise UsageError(f"the module {error.name} is missing: pip install lm_eval") from None
    model, tokenizer = load_model(path, sequence_len)
    scorer = Scorer(model.to(device).eval(), tokenizer, batch_size)

    class MiniseriesLM(base):
        backend = "causal"
        tokenizer = None  # of the transformers library: no chat templates

        @property
        def eot_token_id(self) -> int:
            return scorer.beginning

        @property
        def tokenizer_name(self) -> str:
            return f"{tokenizer.name}-{tokenizer.sha256[:12]}"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Any:
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            answers = scorer.score([(context, ending) for _, context, ending in requests])
            for (texts, *_), answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            scores = scorer.score([([], self.tok_encode(text)) for text in texts])
            for text, (score, _) in zip(texts, scores, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
            return [score for score, _ in scores]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts = scorer.generate([request.args for request in requests])
            for request, text in zip(requests, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return texts

    return MiniseriesLM()


class Scorer:
    """What the harness asks of a model, in tokens and in batches.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        batch_size: sequences at a time.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.beginning = beginning_token(tokenizer)

    @torch.no_grad()
    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Log-probability of each ending after its context, and whether it is the greedy one."""
        pieces = [
            (index, inputs, targets)
            for index, (context, ending) in enumerate(pairs)
            for inputs, targets in self._windows(context, ending)
        ]
        pieces.sort(key=lambda piece: -len(piece[1]))  # so that little is padded
        totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for first in range(0, len(pieces), self.batch_size):
            group = pieces[first : first + self.batch_size]
            logits = self._logits([inputs for _, inputs, _ in group])
            for row, (index, inputs, targets) in zip(logits, group, strict=True):
                found = row[len(inputs) - len(targets) : len(inputs)].log_softmax(-1)  # (n, V)
                wanted = torch.tensor(targets, device=found.device)
                totals[index] += float(found.gather(1, wanted[:, None]).double().sum())
                greedy[index] &= bool((found.argmax(-1) == wanted).all())
        return list(zip(totals, greedy, strict=True))

    def _windows(
        self, context: Sequence[int], ending: Sequence[int]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Inputs of at most the model's length, and the last tokens that follow them to score."""
        start = [] if list(context[:1]) == [self.beginning] else [self.beginning]
        tokens = [*start, *context, *ending]
        longest = self.model.config.sequence_len
        for begin in range(len(tokens) - len(ending), len(tokens), longest):
            end = min(begin + longest, len(tokens))
            yield tokens[max(0, end - 1 - longest) : end - 1], tokens[begin:end]

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B, T, V): rows are padded behind their end, which a causal model does not see."""
        longest = max(len(row) for row in rows)
        padded = [[*row, *[self.beginning] * (longest - len(row))] for row in rows]
        device = next(self.model.parameters()).device
        logits: Tensor = self.model(torch.tensor(padded, device=device))
        return logits.float()

    @torch.no_grad()
    def generate(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Continue each context until one of its stop texts, the end of the document or enough."""
        texts: list[str] = []
        for first in range(0, len(requests), self.batch_size):
            texts += self._generate(requests[first : first + self.batch_size])
        return texts

    def _generate(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        generator = torch.Generator().manual_seed(_SEED)
        rows = [[self.beginning, *self.tokenizer.encode(text).tolist()] for text, _ in requests]
        found: list[list[int]] = [[] for _ in requests]
        texts = ["" for _ in requests]
        waiting = list(range(len(requests)))
        while waiting:
            inputs = [rows[i][-self.model.config.sequence_len :] for i in waiting]
            logits = self._logits(inputs)
            going_on = []
            for row, i, read in zip(logits, waiting, inputs, strict=True):
                settings = requests[i][1]
                token = _choose(row[len(read) - 1].cpu(), settings, generator)
                ended = token == self.tokenizer.separator
                if not ended:
                    rows[i].append(token)
                    found[i].append(token)
                whole = self.tokenizer.decode(found[i]).decode("utf-8", errors="replace")
                texts[i], stopped = _cut(whole, settings.get("until") or [])
                most = int(settings.get("max_gen_toks", _MOST_GENERATED))
                if not (ended or stopped or len(found[i]) >= most):
                    going_on.append(i)
            waiting = going_on
        return texts


def _choose(logits: Tensor, settings: dict[str, Any], generator: torch.Generator) -> int:
    temperature = float(settings.get("temperature", 0.0))
    if not settings.get("do_sample", temperature > 0) or temperature == 0:
        return int(logits.argmax())
    return int((logits / temperature).softmax(-1).multinomial(1, generator=generator))


def _cut(text: str, until: str | Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop texts, and whether there was one."""
    stops = [until] if isinstance(until, str) else until
    places = [text.index(stop) for stop in stops if stop and stop in text]
    return (text[: min(places)], True) if places else (text, False)
