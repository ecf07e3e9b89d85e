"""AdamW by others, in float32 and with float32 states, where its steps can be compared with ours.

Extra ``peers`` installs them, but for apex: the one on the package index is another project, and
NVIDIA's is built from its source. A peer that is not there is named, with the reason.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

Params = Iterable[torch.nn.Parameter]


def optimi(params: Params, device: str, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Make torch-optimi's; its own eps is 1e-6."""
    from optimi import AdamW

    del device
    return AdamW(params, eps=1e-8, **settings)


def torchao(params: Params, device: str, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Make the one that torchao's AdamW8bit is compared with: compiled, its states as given."""
    from torchao.optim.adam import _AdamW

    del device
    return _AdamW(params, **settings)


def bitsandbytes(params: Params, device: str, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Make the 32-bit one."""
    from bitsandbytes.optim import AdamW32bit

    del device
    return AdamW32bit(params, **settings)


def flashoptim(params: Params, device: str, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Make the one without quantised states; its kernels are for GPUs alone."""
    from flashoptim import FlashAdamW

    return FlashAdamW(
        params, quantize=False, master_weight_bits=None, fused=device == "cuda", **settings
    )


def apex(params: Params, device: str, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Make NVIDIA's multi-tensor one."""
    from apex.optimizers import FusedAdam

    del device
    return FusedAdam(params, adam_w_mode=True, **settings)


# Name: how it is made, and the module that has to be there for it.
PEERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], str]] = {
    "optimi.AdamW": (optimi, "optimi"),
    "torchao _AdamW": (torchao, "torchao"),
    "bitsandbytes AdamW32bit": (bitsandbytes, "bitsandbytes"),
    "flashoptim FlashAdamW(quantize=False)": (flashoptim, "flashoptim"),
    "apex FusedAdam": (apex, "apex.optimizers"),
}

NOT_ON_THE_INDEX = {"apex": "; NVIDIA's is built from its source, the package index has another"}


def missing(module: str) -> str | None:
    """Return why a peer is left out, None where it can be imported."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed" + NOT_ON_THE_INDEX.get(package, "")
    if importlib.util.find_spec(module) is None:
        return f"the {package} that is installed has no {module}"
    if package == "apex" and not torch.cuda.is_available():
        return "apex needs a CUDA device"
    return None


def quiet(run: Callable[[], object]) -> object:
    """Run without the warnings that other libraries give."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()
