"""Settings every test shares: interpreter mode, threads, seeds and the device under test."""

import os

# Read by OpenMP when torch is loaded: test workers share the cores, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib.util
import random
import sys

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    # Triton decides between compiler and interpreter when it is imported.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "triton was imported before tests/conftest.py could set TRITON_INTERPRET=1; "
            "set it in the environment, or disable the pytest plugin that imports triton"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def _mend_interpreter() -> None:
    """Let the interpreter of Triton 3.6 count by tensors: NumPy 2.4 refuses its conversion."""
    import triton
    from triton.runtime import interpreter

    if triton.__version__ >= "3.7":
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if DEVICE == "cpu" and importlib.util.find_spec("triton"):
    _mend_interpreter()


@pytest.fixture(scope="session")
def device() -> str:
    """Return "cuda" where there is a CUDA device, else "cpu"."""
    return DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
