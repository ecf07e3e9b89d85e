"""Saving and loading an optimizer: its state, the controller's, and what pickle must not take."""

from typing import Any

import torch
from torch import Tensor

from ars.batch import is_decoupled
from ars.controller import ARSController
from ars.loading import check_state_dict, unchanged_on_error
from ars.placement import PlacedAdam
from ars.state import restore_dtypes, step_kind

__all__ = ["CheckpointedAdam"]


class CheckpointedAdam(PlacedAdam):
    """Adam whose state dict holds the controller, and whose state keeps its dtypes on loading."""

    _watches: str | None

    def _step_kind(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """Return the device and dtype of the parameter's step counter."""
        return step_kind(group, param, triton=self._implementation == "triton")

    def _save_controller(self) -> None:
        """Have ``state_dict()`` return the controller too, before the user's hooks see it.

        The hook stays: one that comes and goes would be in the way of another thread's call.
        """
        if _add_controller not in self._optimizer_state_dict_post_hooks.values():
            self.register_state_dict_post_hook(_add_controller, prepend=True)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class or by torch's Adam and AdamW.

        Moments stay float32 under half-precision parameters. A state without a controller starts
        this optimizer's controller afresh.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            TypeError: Something in it has another type.
            ValueError: The state is of other parameters or of another controller, something in it
                is missing or out of its range, or the penalty is not where the parameters now are.
            RuntimeError: ``foreach`` or ``fused`` was forced where the parameters now are. Whatever
                is raised, nothing has been changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"a state dict must be a dict, got {type(state_dict).__name__}")
        loaded: dict[str, Any] = {}

        def check(_: Any, state_dict: dict[str, Any]) -> None:
            self._follow()  # for the state is restored where the step is taken
            saved = state_dict.get("controller")
            if self._controller is not None and saved is not None:
                self._controller.check_state_dict(saved)
            check_state_dict(self, state_dict, products=self._keeps_products)
            loaded.update(state_dict)

        # Hooks of the user's may replace the state before, and change what was loaded after.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True),
        )
        try:
            with unchanged_on_error(self, self._controller):
                super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self, loaded: dict[str, Any]) -> None:
        """Bring back what torch has cast or does not know of a state that it has loaded.

        Raises:
            ValueError: The groups differ in ``decoupled_weight_decay``.
        """
        is_decoupled(self.param_groups)
        for group, old in zip(self.param_groups, loaded["param_groups"], strict=True):
            for param, key in zip(group["params"], old["params"], strict=True):
                if key in loaded["state"]:
                    kind = self._step_kind(group, param)
                    own, old_state = self.state[param], loaded["state"][key]
                    restore_dtypes(
                        own, param, old_state, kind, self._precision, products=self._keeps_products
                    )
        if self._controller is not None:
            saved = loaded.get("controller")
            fresh = ARSController(self._controller.config).state_dict()
            self._controller.load_state_dict(fresh if saved is None else saved)
            self._watches = None if saved is None else saved.get("watches")

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the controller and the penalty too; the rest is made and chosen anew."""
        state: dict[str, Any] = super().__getstate__()
        for name in (
            "_controller", "_watches", "_replicas", "_penalty", "_max_grad_norm", "_buffer",
            "_precision",
        ):  # fmt: skip
            state[name] = self.__dict__[name]
        return state


def _add_controller(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the controller's tensors under ``"controller"`` in a state dict."""
    assert isinstance(optimizer, CheckpointedAdam)
    if optimizer._controller is not None:
        memory = optimizer._controller.state_dict()
        state_dict["controller"] = {**memory, "watches": optimizer._watches}
