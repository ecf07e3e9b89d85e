r"""Batches, in each of the forms that data comes in.

    (inputs, targets)                    logits = model(inputs)
    {"input_ids": x, "labels": y, ...}   logits = model(input_ids=x, ...); y gives the targets
    anything, with a loss_fn             losses = loss_fn(model, batch), one for each sample

Hugging Face's models take labels as they are and shift them, or not: a causal language model holds
logits[:, :-1] against labels[:, 1:], others compare position by position. Their class does not tell
(``loss_type`` of T5 is that of a causal model, which it is not), but the gradient of the model's
own loss by its logits does: up to a factor it is

    softmax(logits_t) - onehot(target_t)

with the one or the other choice of the targets, or else the loss is not a cross-entropy of these.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from ars.regularizers.checks import (
    IGNORE_INDEX,
    check_positive_int,
    checked_batch,
    checked_batches,
)
from ars.regularizers.fisher.estimators import Samples, accumulation_dtype, logits_of
from ars.regularizers.fisher.row_proof import computed_in, outputs_tolerance

__all__ = [
    "Batch",
    "Labels",
    "LossFunction",
    "check_loss_fn",
    "labelled_samples",
    "samples_with_losses",
    "take_samples",
    "unlabelled_samples",
]

Batch: TypeAlias = tuple[Tensor, ...] | Mapping[str, Any]

# Largest deviation of the gradient of a model's own loss from softmax - onehot, relative to its
# norm: bfloat16 rounds by 0.4 %, while a label smoothing of 0.1 is off by 7 % and more.
SAME_LOSS = 0.02


class LossFunction(Protocol):
    """What ``loss_fn`` is: the loss of every sample of a batch, by itself."""

    def __call__(self, model: nn.Module, batch: Any, /) -> Tensor:
        """Return the losses, (B,), in floating point and with a graph."""
        ...


def labelled_samples(
    model: nn.Module,
    batches: Any,
    n_samples: int | None,
    *,
    segments: bool = False,
    needed: bool = True,
) -> Iterator[tuple[Any, ...]]:
    """Yield checked batches of samples and targets, and maybe segments, until there are enough.

    Args:
        model: In evaluation mode while batches are drawn.
        batches: What a user passed.
        n_samples: As for :func:`take_samples`.
        segments: Whether batches hold segments.
        needed: As for :func:`take_samples`.
    """
    labels = Labels(model)

    def checked(batch: object, index: int) -> tuple[Any, ...]:
        if not isinstance(batch, Mapping):
            inputs, *rest = checked_batch(batch, index, segments=segments)
            return Samples.of_inputs(inputs), *rest
        if segments:
            raise TypeError(
                f"batch {index} is a mapping, which has no segments: with unit='segment' pass "
                "triples (inputs, targets, segments)"
            )
        return labels.samples_and_targets(batch, index)

    given = enumerate(checked_batches(batches))
    return take_samples((checked(b, i) for i, b in given), n_samples, needed=needed)


def take_samples(
    batches: Iterable[tuple[Any, ...]], n_samples: int | None, *, needed: bool = True
) -> Iterator[tuple[Any, ...]]:
    """Yield batches until they hold ``n_samples``, cutting the last one to fit.

    Args:
        batches: Checked tensors or samples, whose first dimension is the samples.
        n_samples: How many samples to take, >= 1; None for all.
        needed: Whether there must be one, if ``n_samples`` is None.

    Raises:
        ValueError: ``n_samples`` is not a positive integer, there are fewer, or none at all. Raised
            where the batches end.
    """
    if n_samples is not None:
        check_positive_int("n_samples", n_samples)
    seen = 0
    for batch in batches:
        if n_samples is not None:
            batch = tuple(part[: n_samples - seen] for part in batch)
        seen += len(batch[0])
        yield batch
        if seen == n_samples:
            return
    if seen == 0 and (needed or n_samples is not None):
        raise ValueError("batches is empty: at least one sample is needed")
    if n_samples is not None:
        raise ValueError(
            f"n_samples={n_samples}, but batches held only {seen} samples; "
            f"provide more, or pass n_samples=None to use the {seen}"
        )


class Labels:
    """How the labels of one model's batches belong to its logits.

    Args:
        model: In evaluation mode while it is asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shifted: bool | None = None  # not known yet

    def samples_and_targets(
        self, batch: Mapping[str, Any], index: int, *, differentiated: bool = True
    ) -> tuple[Samples, Tensor]:
        """Return the samples of a mapping, and their targets: its labels, where logits hold them.

        Args:
            batch: Keyword arguments of the model, and ``labels``, (B,) or (B, T) int64. An
                encoder-decoder without ``decoder_input_ids`` gets those that it makes of labels.
            index: Its number, for messages.
            differentiated: Whether what is computed of it will be.

        Raises:
            TypeError: There are no labels, or not int64 ones.
            ValueError: A tensor does not hold the samples in its first dimension, or the model's
                own loss is another than the cross-entropy with its labels, shifted or not.
        """
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"batch {index} is a mapping without a tensor 'labels' (it has {list(batch)}): add "
                "them (for a causal language model a copy of input_ids with -100 where padded), or "
                "pass loss_fn"
            )
        arguments = {key: value for key, value in batch.items() if key != "labels"}
        if labels.ndim and labels.dtype == torch.int64:
            arguments = _with_decoder_inputs(self._model, arguments, labels)
        what = f"batch {index}"
        size = len(labels) if labels.ndim else 0
        samples = Samples.of_batch(arguments, size, _logits, what=what)
        if not samples.tensors:
            raise TypeError(f"{what} has no tensor beside its labels; it has {list(batch)}")
        checked = [
            checked_batch((tensor, labels), index, segments=False, differentiated=differentiated)
            for tensor in samples.tensors
        ]
        labels = checked[0][1]
        if self._are_shifted(arguments, labels):
            labels = _shifted(labels)
        return samples, labels

    def _are_shifted(self, arguments: Mapping[str, Any], labels: Tensor) -> bool:
        if self._shifted is None and bool((labels != IGNORE_INDEX).any()):
            self._shifted = self._look(arguments, labels)
        return bool(self._shifted)

    def _look(self, arguments: Mapping[str, Any], labels: Tensor) -> bool | None:
        """Return whether the model shifts the labels of one sample; None if it cannot be told."""  # noqa: DOC501
        n = int((labels != IGNORE_INDEX).view(len(labels), -1).sum(1).argmax())
        both = Samples.of_batch({**arguments, "labels": labels}, len(labels), _outputs, what="it")
        one = both.holding([tensor[n : n + 1].clone() for tensor in both.tensors])
        with torch.enable_grad():
            outputs = _own_outputs(self._model, one)
            loss, logits = getattr(outputs, "loss", None), logits_of(outputs)
            if not isinstance(loss, Tensor):
                return False  # it has no loss of its own
            one_target = labels[n : n + 1]
            if not isinstance(logits, Tensor) or logits.shape[:-1] != one_target.shape:
                return False  # an error of its own
            found = None
            if loss.requires_grad and logits.requires_grad:
                (found,) = torch.autograd.grad(loss, logits, allow_unused=True)
        logits = logits.detach()
        if (logits.isnan() | (logits == torch.inf)).any():
            return None  # an error of its own
        for shifted in (False, True)[: labels.ndim]:
            targets = _shifted(one_target) if shifted else one_target
            if found is not None and _is_gradient_of(found, logits, targets):
                return shifted
        raise ValueError(
            f"the loss of {type(self._model).__name__} is not the cross-entropy of its logits with "
            "the labels, neither as they are nor shifted by one (is it smoothed, weighted, or of "
            "another kind?): pass it to fit as loss_fn with estimator='empirical', or pass pairs "
            "(inputs, targets)"
        )


def unlabelled_samples(batch: Mapping[str, Any], index: int) -> tuple[Samples, Tensor]:
    """Return the samples of a mapping, and targets that mask what its attention mask does.

    Args:
        batch: Keyword arguments of the model; ``labels`` are left out.
        index: Its number, for messages.

    Raises:
        TypeError: It has no tensor.
        ValueError: It is empty, or a tensor does not hold the samples in its first dimension.
    """
    arguments = {key: value for key, value in batch.items() if key != "labels"}
    what = f"batch {index}"
    first = _first_tensor(arguments)
    if first is None:
        raise TypeError(f"{what} has no tensor with samples; it has {list(batch)}")
    if len(first) == 0:
        raise ValueError(f"{what} is empty: its first tensor has shape {tuple(first.shape)}")
    targets = torch.zeros(len(first), dtype=torch.int64, device=first.device)
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        targets = torch.where(mask != 0, 0, IGNORE_INDEX)
    return Samples.of_batch(arguments, len(first), _logits, what=what), targets


def _outputs(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    return model(**arguments)


def _logits(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    return logits_of(model(**arguments))


def _own_outputs(model: nn.Module, samples: Samples) -> Any:
    """Return what a model returns for labels; None if it takes none."""
    kinds = inspect.signature(model.forward).parameters
    if "labels" in kinds:
        return samples.run(model)
    if not any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in kinds.values()):
        return None
    try:
        return samples.run(model)
    except TypeError:  # of a model inside that takes none
        return None


def _with_decoder_inputs(
    model: nn.Module, arguments: dict[str, Any], labels: Tensor
) -> dict[str, Any]:
    """Add what an encoder-decoder of Hugging Face makes of labels, if they are given alone."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is None or not {"decoder_input_ids", "decoder_inputs_embeds"}.isdisjoint(arguments):
        return arguments
    return {**arguments, "decoder_input_ids": make(labels=labels)}


def _shifted(labels: Tensor) -> Tensor:
    """Return what each position of a causal language model predicts: the label behind it."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _is_gradient_of(found: Tensor, logits: Tensor, targets: Tensor) -> bool:
    """Whether a gradient is a multiple of that of the cross-entropy."""
    wide = accumulation_dtype(logits.dtype)
    valid = (targets != IGNORE_INDEX)[..., None]
    expected = logits.to(wide).softmax(-1)
    expected.scatter_add_(
        -1, targets.clamp(0, logits.shape[-1] - 1)[..., None], -torch.ones_like(valid, dtype=wide)
    )
    expected = torch.where(valid, expected, 0.0)
    found = found.to(wide)
    if not valid.any():  # a mean of nothing, or a sum
        return not found.isfinite().all() or not found.any()
    factor = (found * expected).sum() / found.square().sum()
    error = torch.linalg.vector_norm(factor * found - expected)
    return bool(factor > 0) and bool(error <= SAME_LOSS * torch.linalg.vector_norm(expected))


def check_loss_fn(loss_fn: object, estimator: str, unit: str) -> None:
    """Refuse a loss that cannot be called, or an estimator that does not use one.

    Args:
        loss_fn: The loss, or None.
        estimator: Of the Fisher.
        unit: Of the Fisher.

    Raises:
        TypeError: It is no function.
        ValueError: The estimator or the unit needs the model's logits.
    """
    if loss_fn is None:
        return
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function of (model, batch), got {type(loss_fn).__name__}"
        )
    if estimator != "empirical":
        raise ValueError(
            f"estimator={estimator!r} draws from, or sums over, the classes of the model's logits, "
            "which a loss_fn does not tell; use estimator='empirical' with it"
        )
    if unit != "sequence":
        raise ValueError(f"unit={unit!r} divides positions, and a loss_fn has none; use 'sequence'")


def samples_with_losses(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction,
    n_samples: int | None,
    *,
    needed: bool = True,
) -> Iterator[tuple[Any, ...]]:
    """Yield samples whose "logits" are their losses, and targets of 0, until there are enough.

    Args:
        model: In evaluation mode while batches are drawn.
        batches: What a user passed.
        loss_fn: Its loss.
        n_samples: As for :func:`take_samples`.
        needed: As for :func:`take_samples`.
    """
    seen: set[object] = set()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return _checked_losses(loss_fn(model, batch))

    def checked(batch: Any, index: int) -> tuple[Samples, Tensor]:
        what = f"batch {index}"
        first = _first_tensor(batch)
        if first is None:
            raise TypeError(
                f"{what} holds no tensor with the samples in its first dimension: with loss_fn "
                "pass tensors, or tuples, lists and mappings of them"
            )
        if len(first) == 0:
            raise ValueError(f"{what} is empty: its first tensor has shape {tuple(first.shape)}")
        samples = Samples.of_batch(batch, len(first), losses, what=what)
        for tensor in samples.tensors:
            if tensor.is_inference():
                raise ValueError(
                    f"a tensor of {what} was made inside torch.inference_mode(), and nothing that "
                    "depends on it can be differentiated; clone it outside"
                )
        if samples.shapes not in seen:
            _check_alone(model, samples, what)
            seen.add(samples.shapes)
        return samples, torch.zeros(len(first), dtype=torch.int64, device=first.device)

    given = enumerate(checked_batches(batches))
    return take_samples((checked(b, i) for i, b in given), n_samples, needed=needed)


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, (Mapping, tuple, list)):
        return None
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def _checked_losses(losses: object) -> Tensor:
    """Return losses as logits of one class, (B, 1)."""  # noqa: DOC501
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"loss_fn must return a floating-point tensor, got {kind}")
    if losses.ndim != 1:
        raise ValueError(
            f"loss_fn returned shape {tuple(losses.shape)}, not (B,): one loss for each sample, "
            "summed over all but the first dimension (reduction='none', then .flatten(1).sum(1))"
        )
    return losses[:, None]


def _check_alone(model: nn.Module, samples: Samples, what: str) -> None:
    """Refuse a loss of one sample that depends on the others, as far as the first and last tell."""  # noqa: DOC501
    count = len(samples)
    ends = sorted({0, count - 1})
    with torch.no_grad():
        together = samples.run(model)
        alone = [samples[n : n + 1].run(model) for n in ends]
    for losses, size in [(together, count), *((each, 1) for each in alone)]:
        if len(losses) != size:
            raise ValueError(
                f"loss_fn returned {len(losses)} losses for {size} samples of {what}: it must "
                "return one for each, and read nothing of the samples but from the batch"
            )
    allowed = outputs_tolerance(computed_in(model.parameters(), samples))
    finite = together[together.isfinite()]
    largest = finite.abs().amax() if finite.numel() else 0.0
    for n, each in zip(ends, alone, strict=True):
        if not torch.isclose(each[0], together[n], rtol=0, atol=float(allowed * largest),
                             equal_nan=True).all():  # fmt: skip
            raise ValueError(
                f"sample {n} of {what} has another loss by itself ({each.item():.4g}) than among "
                f"the {count} of its batch ({together[n].item():.4g}): loss_fn or the model lets "
                "samples influence one another (a mean over the batch, batch statistics, in-batch "
                "negatives) or draws random numbers, so no sample has a gradient of its own"
            )
