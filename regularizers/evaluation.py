"""The states a model is differentiated in, and the parameters it is differentiated by."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["check_trainable", "computed_in", "evaluation_mode", "in_float32", "trainable"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with ``requires_grad``, each once, under its first name.

    Args:
        model: Any module.

    Returns:
        At least one parameter by name, in the model's order.

    Raises:
        ValueError: There is none.
        TypeError: One is complex.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_trainable(parameters)
    for name, p in parameters.items():
        if p.is_complex():
            raise TypeError(f"parameter {name!r} is complex; only real parameters are supported")
    return parameters


def check_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that cannot be differentiated by.

    Args:
        parameters: Those with ``requires_grad``, by name.

    Raises:
        ValueError: There is none, or one was made in inference mode.
    """
    if not parameters:
        raise ValueError(
            "the model has no parameter with requires_grad=True; call requires_grad_() on those "
            "that are to be measured"
        )
    for name, p in parameters.items():
        if p.is_inference():
            raise ValueError(
                f"parameter {name!r} was made inside torch.inference_mode() and can never be "
                "differentiated; make the model outside"
            )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and every module back as it was afterwards.

    Recurrent layers stay in training mode with their dropout at 0, which computes the same: cuDNN
    differentiates them in no other mode.
    """
    training = {module: module.training for module in model.modules()}
    dropout = {m: m.dropout for m in model.modules() if isinstance(m, nn.RNNBase)}
    model.eval()
    try:
        for recurrent in dropout:
            recurrent.train()
            recurrent.dropout = 0.0
        yield
    finally:
        for recurrent, probability in dropout.items():
            recurrent.dropout = probability
        for module, flag in training.items():
            module.training = flag


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let the model compute in float32 at least: without autocast, its halves widened meanwhile."""
    tensors = [*model.parameters(), *model.buffers()]
    halves = [t for t in tensors if t.dtype in {torch.bfloat16, torch.float16}]
    stored = [t.data for t in halves]
    with ExitStack() as autocast:
        for device in {t.device.type for t in tensors}:
            autocast.enter_context(torch.autocast(device, enabled=False))
        try:
            for tensor in halves:
                tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, data in zip(halves, stored, strict=True):
                tensor.data = data


def computed_in(parameters: Iterable[nn.Parameter], inputs: Tensor) -> torch.dtype:
    """Return the coarsest dtype that a model computes in: its parameters', or autocast's."""
    device = inputs.device.type
    dtypes = [p.dtype for p in parameters]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
