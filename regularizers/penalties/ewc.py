r"""Elastic weight consolidation: a quadratic pull towards an anchor, weighted by the Fisher.

    E(theta) = 1/2 lambda sum_i Omega_i (theta_i - theta*_i)^2

The value is :func:`ars.reference.ewc_value`; its two steps are defined beside it. After further
tasks the pull is towards the newest model (:meth:`EWC.consolidate`), or towards all of them
(:meth:`EWC.add_task`):

    sum_t F_t (theta - theta_t)^2 = Omega (theta - mu)^2 + const,
    Omega = sum_t F_t,   mu = sum_t F_t theta_t / Omega
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ars.regularizers.checks import checked_choice, checked_module
from ars.regularizers.fisher.diagonal import DiagonalFisher
from ars.regularizers.fisher.estimators import accumulation_dtype
from ars.regularizers.penalties.penalty_base import (
    PenaltyBase,
    check_label,
    check_names,
    check_option,
    check_state,
    check_tensor,
    check_unmoved,
    checked_decay,
    checked_strength,
    copy_like,
    estimator_of,
    importance_of,
    live_parameters,
    parameters_in_state,
    sharded_since,
    without_wrappers,
)
from ars.regularizers.penalties.quadratic import Pull, quadratic_value
from ars.regularizers.penalties.strength import factor_of, layer_factors
from ars.regularizers.storage import dequantize
from ars.sharded import is_sharded, is_true_everywhere, part_of, reshard, sum_of_parts, with_part

__all__ = ["EWC"]

Mode: TypeAlias = Literal["coupled", "proximal"]
Storage: TypeAlias = Literal["full", "bfloat16", "compact"]

# Below it an importance does nothing at any usable strength; above this share of such entries the
# penalty is one of a few parameters. Inputs that are always 0 leave fewer.
_NEGLIGIBLE, _COLLAPSED = 1e-12, 0.99


class EWC(PenaltyBase):
    r"""Elastic weight consolidation (EWC) penalty.

    .. math:: E(\theta) = \tfrac12 \lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2

    :math:`\theta^*` (:attr:`anchor`) is the model as it is now, :math:`\lambda` is
    :attr:`strength`. The factor 1/2 is the paper's; Avalanche and mammoth leave it out, so their
    lambda is ours / 2.

    An optimizer that takes a penalty reads :meth:`terms`, :attr:`strength` and :attr:`mode`:

    * ``"coupled"``: :math:`\lambda \Omega (\theta - \theta^*)` joins the gradient, after clipping;
    * ``"proximal"``: after the step on the task loss alone,
      :math:`\theta \leftarrow \theta^* + (\theta - \theta^*) / (1 + \lambda\Omega D)` with Adam's
      metric :math:`D = \eta / (\sqrt{\hat v} + \epsilon)`; stable for every strength.

    With any other optimizer add :meth:`value` to the loss.

    Anchor and importance are copies with the parameter's strides and device; move the model before
    building the penalty. Parameters that ``fisher`` does not name are left alone. Storage, whatever
    the number of tasks:

    * ``"full"``: float32 (float64 for a float64 parameter), 8 bytes a parameter;
    * ``"bfloat16"``: 4 bytes. The anchor of a float32 parameter is then off by up to 1 part in 512,
      and so the penalty is not exactly 0 at the start;
    * ``"compact"``: the same with the importance in uint8 (:func:`~ars.regularizers.quantize`),
      3.06 bytes.

    Args:
        model: Its current parameters become the anchor.
        fisher: A fitted :class:`~ars.regularizers.DiagonalFisher`, or a mapping from parameter
            name to importance: the parameter's shape, finite, >= 0.
        strength: lambda, in [0, 1e38]; a number or a 0-d tensor. A plain attribute, which may be
            changed at any time.
        mode: ``"coupled"`` or ``"proximal"``.
        layer_strengths: Factors of lambda, finite, >= 0, by parameter name or shell pattern
            (``"blocks.*.weight"``); a name goes before patterns, patterns in their order, and what
            none matches has 1. They are folded into the importance.
        storage: ``"full"``, ``"bfloat16"`` or ``"compact"``, which needs contiguous parameters.

    Raises:
        TypeError: ``model`` is not a module, ``fisher`` neither of the two, an importance not a
            floating-point tensor, or ``strength`` not a number.
        ValueError: ``fisher`` is not fitted, is empty, names a parameter that the model does not
            have, or holds a wrong shape or a value that is negative or not finite; ``strength`` is
            negative or not finite; ``mode`` or ``storage`` is unknown; a key of ``layer_strengths``
            matches no penalised parameter.

    Example:
        >>> import torch
        >>> from ars.regularizers import EWC
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> penalty = EWC(model, {"weight": torch.tensor([[2.0, 0.0]])}, strength=10.0)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> round(penalty.value().item(), 4)  # 1/2 * 10 * (2 * 1^2 + 0 * 1^2)
        10.0

    References:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks",
        arXiv:1612.00796.
        Huszar, "On quadratic penalties in elastic weight consolidation", arXiv:1712.03847.
        Schwarz et al., "Progress & Compress", arXiv:1805.06370.
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: DiagonalFisher | Mapping[str, Tensor],
        strength: float | Tensor = 1.0,
        mode: Mode = "coupled",
        *,
        layer_strengths: Mapping[str, float] | None = None,
        storage: Storage = "full",
    ) -> None:
        self._model = model = checked_module(model)
        reshard(model)
        parameters = dict(model.named_parameters())
        importance = without_wrappers(importance_of(fisher), self._model)
        check_names(importance, model, "fisher")
        self._parameters = {name: p for name, p in parameters.items() if name in importance}
        _check_importance(importance, self._parameters)
        self.strength = strength
        self.mode: Mode = checked_choice("mode", mode, get_args(Mode))
        self.storage: Storage = checked_choice("storage", storage, get_args(Storage))
        self._factors = layer_factors(layer_strengths, self._parameters)
        self._layer_strengths = dict(layer_strengths or {})  # of parameters that are still to come
        self._pulls = {}
        for name, p in self._parameters.items():
            omega = _weighted(name, p, importance[name], self._factors[name])
            self._pulls[name] = Pull(name, p, omega, storage)
        self.estimator = estimator_of(fisher)
        self.constant = 0.0

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The anchor by parameter name, as it is stored."""
        return {name: pull.anchor for name, pull in self._pulls.items()}

    @property
    def importance(self) -> dict[str, Tensor]:
        """Omega by parameter name: what is stored, or with ``"compact"`` an expanded copy."""
        return {name: pull.omega() for name, pull in self._pulls.items()}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of every penalised tensor, in the model's order."""
        return list(self._parameters.items())

    def terms(self) -> list[tuple[Tensor, ...]]:
        """Parameter, anchor and importance of every penalised tensor, in the model's order.

        With ``"compact"``: parameter, anchor, uint8 importance and its blocks' scales.
        """
        self._follow_sharding()
        return [pull.term() for pull in self._pulls.values()]

    def value(self) -> Tensor:
        """Return the penalty E, 0-d, on the first parameter's device.

        One differentiable operation, of any order, which keeps only references for the backward
        pass.
        """
        self._follow_sharding()
        for name, pull in self._pulls.items():
            check_unmoved(name, pull.param, pull.anchor)
        return quadratic_value(list(self._pulls.values()), self.strength)

    @torch.no_grad()
    def consolidate(
        self, fisher: DiagonalFisher | Mapping[str, Tensor], *, decay: float = 1.0
    ) -> None:
        r"""Online EWC: :math:`\Omega \leftarrow \gamma \Omega + F`, anchored at the model as it is.

        A parameter that only one of the two names, such as a new head, has importance 0 in the
        other. One that the model has no more is dropped. Tensors keep their addresses, and an
        optimizer that holds this penalty goes on with it; give it new parameters by
        ``add_param_group`` first.

        Args:
            fisher: F of the task that was learned last.
            decay: gamma in [0, 1], how much of the earlier tasks is kept.

        Raises:
            TypeError: As for the constructor. Nothing has changed then.
            ValueError: As for the constructor, or ``decay`` is out of range. Nothing has changed
                then.
        """
        decay = checked_decay(decay)
        for pull, new in self._next_task_importances(fisher, decay):
            pull.assign(pull.omega().to(new.dtype) * decay + new, pull.param)
        self._merge_estimator(fisher, decay)
        self.constant = 0.0

    @torch.no_grad()
    def add_task(self, fisher: DiagonalFisher | Mapping[str, Tensor]) -> None:
        r"""EWC with a term for each task, in the memory of one.

        The sum of K quadratic terms is one: :math:`\Omega = \sum_t F_t` around
        :math:`\mu = \sum_t F_t \theta_t / \Omega`. Gradients are those of the sum; its value is
        ``value() + strength * constant``. What is new, or no more, is as for :meth:`consolidate`.

        Args:
            fisher: F of the task that was learned last; the model as it is is its anchor.

        Raises:
            TypeError: As for the constructor. Nothing has changed then.
            ValueError: As for the constructor. Nothing has changed then.
        """
        for pull, new in self._next_task_importances(fisher):
            tensors = pull.param, pull.omega(), pull.anchor, new
            param, old, anchor, new = map(part_of, tensors)
            anchor, total = anchor.to(new.dtype), old + new
            # Where no task cares the anchor follows the model.
            share = torch.where(total > 0, new / total, 1.0)
            delta = param - anchor
            square = (old * share * delta * delta).sum(dtype=torch.float64)
            self.constant += 0.5 * float(sum_of_parts([square], [pull.param]))
            pull.assign(with_part(total, pull.param), with_part(anchor + share * delta, pull.param))
        self._merge_estimator(fisher)

    @torch.no_grad()
    def grown(self, model: nn.Module) -> "EWC":
        """Return this penalty for a model whose parameters have become larger.

        The leading block of each parameter is penalised as before; what is new is free. For a head
        that got more classes, say; a model that was rescaled as it grew maps its own importance.

        Args:
            model: Has the same names, each of at least the old size in every dimension.

        Returns:
            A new penalty, with the same options.

        Raises:
            ValueError: A parameter is missing or smaller in ``model``.
        """
        parameters = dict(checked_module(model).named_parameters())
        check_names(self._pulls, model, "this penalty")
        for name, p in [*self._parameters.items(), *parameters.items()]:
            if is_sharded(p):
                raise ValueError(
                    f"{name!r} is sharded, and its leading block lies in other processes; grow the "
                    "model and its penalty before they are sharded"
                )
        old = self.importance
        importance = {name: _embedded(name, old[name], parameters[name]) for name in old}
        penalty = EWC(model, importance, self.strength, self.mode, storage=self.storage)
        for name, pull in penalty._pulls.items():
            anchor = self._pulls[name].anchor
            pull.anchor[tuple(slice(n) for n in anchor.shape)] = anchor
        penalty._factors, penalty._layer_strengths = dict(self._factors), self._layer_strengths
        penalty.estimator, penalty.constant = self.estimator, self.constant
        return penalty

    def state_dict(self) -> dict[str, Any]:
        """Options, and references to the anchor and importance tensors by parameter name.

        Of a sharded parameter a ``"compact"`` importance is expanded, with an empty scale.
        """
        self._follow_sharding()
        terms = {name: pull.term() for name, pull in self._pulls.items()}
        state: dict[str, Any] = {
            "strength": float(self.strength),
            "mode": self.mode,
            "estimator": self.estimator,
            "constant": self.constant,
            "storage": self.storage,
            "layer_strengths": dict(self._factors),
            "anchor": {name: term[1] for name, term in terms.items()},
            "importance": {name: term[2] for name, term in terms.items()},
        }
        if self.storage == "compact":
            state["scale"] = {name: term[3] for name, term in terms.items()}
            for name, pull in self._pulls.items():
                if is_sharded(pull.param):  # whose blocks are of one way of sharding it
                    state["importance"][name] = pull.omega()
                    state["scale"][name] = torch.zeros(0)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state into this penalty's own tensors, whose addresses do not change.

        Parameters of the model that the state holds and this penalty does not are taken in.

        Args:
            state: What :meth:`state_dict` returned, on any device, of the same storage.

        Raises:
            TypeError: An entry has the wrong type. Nothing has changed then.
            ValueError: The state is of another model or holds an invalid value. Nothing has changed
                then; the message names the first difference.
        """
        self._follow_sharding()
        state = without_wrappers(state, self._model)
        parameters = parameters_in_state(state, "anchor", self._model, self._parameters)
        if isinstance(state, Mapping) and "storage" in state:  # on it depends what else there is
            check_option("storage", state["storage"], self.storage)
        parts = set(self.state_dict()) - {"strength", "mode", "estimator", "constant", "storage"}
        check_state("an EWC", state, set(self.state_dict()), parts, parameters)
        check_label("estimator", state["estimator"])
        importance = dict(state["importance"])
        for name, p in parameters.items():
            if self.storage == "compact" and state["scale"][name].numel():
                importance[name] = dequantize(importance[name], state["scale"][name])
            check_tensor(f"the state's anchor of {name!r}", state["anchor"][name], p)
            check_tensor(f"the state's importance of {name!r}", importance[name], p, minimum=0.0)
        strength = checked_strength(state["strength"])
        mode = checked_choice("mode", state["mode"], get_args(Mode))
        constant = checked_strength(state["constant"], "the state's constant")
        factors = layer_factors(state["layer_strengths"], parameters)
        pulls = self._pulls_of(parameters)
        self._set_pulls(parameters, factors, pulls)
        self.strength, self.mode, self.constant = strength, mode, float(constant)
        self.estimator = state["estimator"]
        for name, pull in pulls.items():
            pull.assign(importance[name], state["anchor"][name])

    def _next_task_importances(
        self, fisher: DiagonalFisher | Mapping[str, Tensor], decay: float = 1.0
    ) -> Iterator[tuple[Pull, Tensor]]:
        """Take the parameters of a further task's Fisher in, and drop those that are no more.

        Args:
            fisher: Of the task.
            decay: What the earlier importances are multiplied with.

        Yields:
            Each pull that is left, and the task's importance, factors included: 0 where its Fisher
            does not name the parameter. That of a parameter that is new here is 0 until now.

        Raises:
            ValueError: A value does not fit, or a sum overflows. Nothing has changed then.
        """
        importance = without_wrappers(importance_of(fisher), self._model)
        self._follow_sharding()
        live = live_parameters(self._model, self._parameters)
        check_names(importance, self._model, "fisher")
        parameters = {n: p for n, p in live.items() if n in importance or n in self._pulls}
        _check_importance(importance, {n: p for n, p in parameters.items() if n in importance})
        given = self._factors
        factors = {
            name: given[name] if name in given else factor_of(self._layer_strengths, name)
            for name in parameters
        }
        pulls = self._pulls_of(parameters)
        for last in (False, True):  # every sum is checked before the first is kept
            for name, pull in pulls.items():
                if name in importance:
                    new = _weighted(name, pull.param, importance[name], factors[name])
                else:
                    new = torch.zeros_like(pull.param, dtype=accumulation_dtype(pull.param.dtype))
                if last:
                    yield pull, new
                elif not is_true_everywhere(
                    (part_of(pull.omega()).to(new.dtype) * decay + part_of(new)).isfinite().all(),
                    pull.param,
                ):
                    raise ValueError(f"the sum of the importances of {name!r} overflows")
            if not last:
                self._set_pulls(parameters, factors, pulls)

    def _pulls_of(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Pull]:
        """Return the pull of each parameter; a new one's has importance 0, anchored where it is."""
        return {
            name: self._pulls.get(name) or Pull(name, p, torch.zeros_like(p), self.storage)
            for name, p in parameters.items()
        }

    def _follow_sharding(self) -> None:
        """Distribute what is kept as the model's parameters are, if they have been since."""
        held = {name: (self._parameters[name], pull.anchor) for name, pull in self._pulls.items()}
        moved = sharded_since(self.__dict__.get("_model"), held)
        if moved:
            pulls = {
                name: pull.moved(moved[name], self.storage) if name in moved else pull
                for name, pull in self._pulls.items()
            }
            self._parameters, self._pulls = self._parameters | moved, pulls
            self.version += 1

    def _set_pulls(
        self, parameters: dict[str, nn.Parameter], factors: dict[str, float], pulls: dict[str, Pull]
    ) -> None:
        """Hold these pulls from now on."""
        self.version += pulls.keys() != self._pulls.keys()
        self._parameters, self._factors, self._pulls = parameters, factors, pulls

    def _merge_estimator(
        self, fisher: DiagonalFisher | Mapping[str, Tensor], decay: float = 1.0
    ) -> None:
        """Note whose importances the sum holds, None for several estimators."""
        new = estimator_of(fisher)
        self.estimator = new if decay == 0 or new == self.estimator else None


def _weighted(name: str, param: Tensor, importance: Tensor, factor: float) -> Tensor:
    """Return a parameter's importance times its factor, in the dtype of the computation."""
    omega = copy_like(param, importance).mul_(factor)
    check_tensor(f"the importance of {name!r}, times its layer strength,", omega, param)
    return omega


def _check_importance(importance: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse an importance that is not finite, not >= 0 or not of its parameter's shape.

    Warn of one that has collapsed: almost all entries negligible, as of a model that is certain.

    Args:
        importance: Omega by parameter name.
        parameters: These parameters by name.

    Raises:
        ValueError: As :func:`check_tensor` says.
    """
    for name, param in parameters.items():
        check_tensor(f"the importance of {name!r}", importance[name], param, minimum=0.0)
    total = sum(omega.numel() for omega in importance.values())
    counts = [(part_of(omega) < _NEGLIGIBLE).sum() for omega in importance.values()]
    small = int(sum_of_parts(counts, list(importance.values())))
    if small >= _COLLAPSED * total > 0:
        warnings.warn(
            f"the importance has collapsed: {small} of {total} entries are below {_NEGLIGIBLE}, so "
            "the penalty holds next to nothing. The empirical Fisher vanishes where the model is "
            "right: use estimator='sketch' or 'logit_reversal', or fit before the loss reaches 0",
            stacklevel=3,
        )


def _embedded(name: str, old: Tensor, grown: Tensor) -> Tensor:
    """Return zeros of the shape of ``grown`` with ``old`` as their leading block.

    Args:
        name: Of the parameter, for messages.
        old: Any tensor.
        grown: Of at least its size in every dimension.

    Returns:
        A tensor of the dtype of ``old`` on the device of ``grown``.

    Raises:
        ValueError: ``grown`` does not hold ``old``.
    """
    same = old.ndim == grown.ndim
    if not same or any(n > m for n, m in zip(old.shape, grown.shape, strict=True)):
        raise ValueError(
            f"{name!r} has shape {tuple(grown.shape)}, which does not hold its old "
            f"{tuple(old.shape)}; leave the parameter out, or compute its Fisher again"
        )
    result = torch.zeros_like(grown, dtype=old.dtype)
    result[tuple(slice(n) for n in old.shape)] = old
    return result
