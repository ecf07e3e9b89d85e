"""Waiting for a GPU as an error."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["waiting_refused"]


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Let whatever makes the host wait for the device raise."""
    with warnings.catch_warnings():
        # That it is a prototype: as an error it would come after the mode is set, and leave it.
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
