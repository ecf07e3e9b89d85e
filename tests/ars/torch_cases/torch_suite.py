"""torch's own optimizer cases with our classes in the place of torch's, for test_torch_suite_*.py.

torch's wheel carries the cases that drive torch's optimizer tests, not the tests. Those tests,
the class ``TestOptimRenewed``, are written anew; each file's docstring names which it covers.
Some cannot apply to a class of ours on a CPU: they

* are about other optimizers: ``test_rosenbrock_sparse``,
  ``test_second_order_optims_return_consistent_types``;
* patch torch's own module: ``test_defaults_changed_to_foreach``;
* need a GPU, or several: ``test_forloop_goes_right_direction_multigpu``,
  ``test_mixed_device_dtype``, ``test_foreach_large_tensor``, ``test_fused_large_tensor``,
  ``test_peak_memory_foreach``, ``test_cpu_load_state_dict``,
  ``test_state_dict_with_cuda_params``, ``test_fused_cpu_matches_cuda``.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from optimizers import make

from ars import ARSAdam, ARSAdamW, ARSConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ImportWarning)  # hypothesis, which the cases do not need
    from torch.testing._internal import common_optimizers
# Importing them freezes the flags of torch.backends, in this process, also for other tests.
torch.backends.__allow_nonbracketed_mutation_flag = True

CLASSES = (ARSAdamW, ARSAdam)
INFOS = {
    cls: next(info for info in common_optimizers.optim_db if info.optim_cls is theirs)
    for cls, theirs in ((ARSAdamW, torch.optim.AdamW), (ARSAdam, torch.optim.Adam))
}
# So sensitive that a dozen steps exercise the trend, the threshold and the significance.
CONTROLLERS = {"off": None, "on": ARSConfig(window=12, threshold=0.2, significance=0.5)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One of torch's constructor inputs, for one of our classes, with or without a controller."""

    cls: type
    given: Mapping[str, object]
    ars: ARSConfig | None
    kernels: bool = False

    @property
    def info(self) -> common_optimizers.OptimizerInfo:
        return INFOS[self.cls]

    @property
    def kwargs(self) -> dict[str, object]:
        """torch's arguments; a tensor among them is made anew, as a scheduler may write to it."""
        return copy.deepcopy(dict(self.given))

    @property
    def falls(self) -> bool:
        return not self.given.get("maximize", False)

    def build(self, params, **changes):
        settings = self.kwargs | {"ars": self.ars} | changes
        if self.kernels:
            return make("triton", params, self.cls, **settings)
        return self.cls(params, **settings)

    def theirs(self, params, **changes):
        return self.info.optim_cls(params, **(self.kwargs | changes))


FLAGS = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "differentiable": {"differentiable": True},
}
IMPLEMENTATIONS = ("loop", "foreach", "fused")
KERNELS_TOO = (*IMPLEMENTATIONS, "triton")


def cases(
    *,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    controllers: Sequence[str] = tuple(CONTROLLERS),
    dtype: torch.dtype = torch.float32,
    every_input: bool = True,
    kernels_every_input: bool = False,
):
    """Parametrize a test by class, torch's inputs, implementation and controller.

    Args:
        implementations: Which of ``FLAGS``; ``""`` for leaving the choice to the optimizer,
            ``"triton"`` for the kernels, in the interpreter.
        controllers: Which of ``CONTROLLERS``.
        dtype: Of the parameters; torch's inputs for float16 have a larger eps.
        every_input: False for the first of torch's inputs alone: what is tested reads none of it.
        kernels_every_input: The same for ``"triton"``, whose interpreter is slow.

    Returns:
        The decorator; the test's argument is ``case``.
    """
    listed = []
    for cls, info in INFOS.items():
        inputs = info.optim_inputs_func(device="cpu", dtype=dtype)
        for index, given in enumerate(inputs if every_input else inputs[:1]):
            for which in implementations:
                if index and which == "triton" and not kernels_every_input:
                    continue
                for controller in controllers:
                    kwargs = given.kwargs | FLAGS.get(which, {})
                    case = Case(cls, kwargs, CONTROLLERS[controller], which == "triton")
                    name = "-".join([cls.__name__, given.desc, which, controller])
                    listed.append(pytest.param(case, id=name.replace(" ", "_")))
    return pytest.mark.parametrize("case", listed)


def affine(*, contiguous: bool = True, bias: int = 10) -> tuple[list[torch.nn.Parameter], Callable]:
    """A weight and a bias, and what gives both their gradient and returns the loss."""
    if contiguous:
        values = [torch.randn(10, 5), torch.randn(bias)]
    else:
        values = [torch.randn(10, 5, 2)[..., 0], torch.randn(bias, 2)[..., 0]]
    params = [torch.nn.Parameter(value) for value in values]
    given = torch.randn(5)
    return params, lambda ours=params: backward(ours, given)


def backward(params, given: torch.Tensor) -> torch.Tensor:
    for param in params:
        param.grad = None
    loss = (params[0].mv(given) + params[1]).pow(2).sum()
    loss.backward()
    return loss


def clones(params) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def named(params, yes: bool):
    return [(f"name{i}", param) for i, param in enumerate(params)] if yes else params


def advance(schedulers, loss) -> None:
    """Step the learning rate schedulers; the one that watches the loss is given it."""
    for scheduler in schedulers:
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*[loss.item()] * plateau)


def assert_same(a: object, b: object, where: str = "") -> None:
    """Check that two nested states have the same structure, types, dtypes and bits."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert a == b, where
