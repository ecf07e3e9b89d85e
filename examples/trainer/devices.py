"""Devices: whether they are there, and what they can do at most."""

import os

import torch

from trainer.errors import UsageError

__all__ = ["PEAK_FLOPS", "use_device"]

# Dense bfloat16 operations a second of one device, by the manufacturers' data sheets.
PEAK_FLOPS = {
    "a100": 312e12,
    "h100": 989e12,
    "h100-pcie": 756e12,
    "h200": 989e12,
    "b200": 2250e12,
    "l4": 121e12,
    "l40s": 362e12,
    "rtx-4090": 165e12,
}


def use_device(name: str, option: str = "--device") -> None:
    """Check that a device is there, for every process that torchrun has started here.

    Args:
        name: "cpu", "cuda" or "cuda:N".
        option: that named it.

    Raises:
        UsageError: it is unknown or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"{option} {name} is unknown: use cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"{option} {name} is not available (CUDA devices found: {count}): use {option} cpu"
            )
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if processes > 1 and device.index is not None:
            raise UsageError(
                f"{option} {name} is one for {processes} processes: use {option} cuda, of which "
                "each takes its own"
            )
        if processes > count:
            raise UsageError(
                f"{option} {name} has {count} for {processes} processes: start at most {count}"
            )
