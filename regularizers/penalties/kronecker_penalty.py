r"""A quadratic pull towards an anchor, weighted by a Kronecker-factored Fisher.

    E = 1/2 lambda sum_l tr(G_l D_l A_l D_l^T),    D_l = [W_l b_l] - [W*_l b*_l]

The value and gradient are defined by :func:`ars.reference.kronecker_value` and
:func:`ars.reference.kronecker_gradient`.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ars.regularizers.checks import checked_module
from ars.regularizers.fisher.covariance import ActivationCovariance
from ars.regularizers.fisher.kronecker import KroneckerFisher
from ars.regularizers.fisher.layers import MatrixLayer, matrix_layers
from ars.regularizers.penalties.matrix_pull import MatrixPull
from ars.regularizers.penalties.penalty_base import (
    PenaltyBase,
    check_label,
    check_names,
    check_state,
    check_tensor,
    checked_decay,
    checked_strength,
    live_parameters,
    parameters_in_state,
    sharded_since,
    without_wrappers,
)
from ars.regularizers.penalties.sharded_value import total_of
from ars.sharded import (
    part_of,
    place_like,
    reshard,
)

__all__ = ["KroneckerPenalty"]

Factors: TypeAlias = (
    KroneckerFisher | ActivationCovariance | Mapping[str, tuple[Tensor, Tensor | None]]
)


class KroneckerPenalty(PenaltyBase):
    r"""Elastic weight consolidation with a Kronecker-factored importance.

    .. math:: E = \tfrac12 \lambda \sum_l \operatorname{tr}(G_l\, D_l\, A_l\, D_l^T), \quad
              D_l = [W_l\; b_l] - [W^*_l\; b^*_l]

    over linear and convolution layers, attention and experts, with :math:`[W^*\,b^*]`
    (:attr:`anchor`) the model as it is now and :math:`\lambda` :attr:`strength`. A weighs the
    directions of a layer's inputs, G those of its outputs. Where :class:`~ars.regularizers.EWC`
    knows one number a weight, this knows that a weight may change as long as the layer's outputs on
    old inputs do not: on permuted digits it keeps 91 % where EWC keeps 66
    (``examples/continual_digits.py``).

    With an :class:`~ars.regularizers.ActivationCovariance` G is the identity: labels, losses and
    backward passes are not needed, and :math:`E = \tfrac12 \lambda\, \mathbb{E} \|D a\|^2`.

    Further tasks (:meth:`consolidate`) cost no memory: the sum of their Kronecker products is kept
    as the nearest single one. With activations that is exact.

    An optimizer that takes a penalty calls :meth:`refresh` at the start of a step, 2 (p d^2 + p^2
    d) floating-point operations a layer, and adds the buffers of :meth:`gradients` after clipping.
    With any other optimizer add :meth:`value` to the loss.

    Memory: A, G, and twice the parameters (anchor and buffer), in float32, or float64 for float64
    parameters.

    Args:
        model: Its current parameters become the anchor.
        factors: A fitted :class:`~ars.regularizers.KroneckerFisher` or
            :class:`~ars.regularizers.ActivationCovariance`, or a mapping from the name of a weight
            to (A, G): A is (d, d), or (d + 1, d + 1) to include the layer's bias as its last
            column, with d the columns of the weight flattened from dimension 1 on (the rows of
            GPT-2's ``Conv1D``, which is stored transposed); G is (p, p), or None everywhere for
            the identity. A weight of several matrices, such as experts', has a dimension in front
            in both, with factors for each.
        strength: lambda, in [0, 1e38]; a number or a 0-d tensor. A plain attribute, which may be
            changed at any time.

    Raises:
        TypeError: ``model`` is not a module, ``factors`` none of the three, a factor not a
            floating-point tensor, or ``strength`` not a number.
        ValueError: ``factors`` is not fitted, is empty, names a parameter that the model does not
            have or that is no matrix, or holds a matrix of the wrong shape, not finite, not
            symmetric or with a negative diagonal; ``strength`` is out of range.

    Example:
        >>> import torch
        >>> from ars.regularizers import KroneckerPenalty
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> a = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # the inputs were (1, 1)
        >>> penalty = KroneckerPenalty(model, {"weight": (a, torch.tensor([[2.0]]))}, strength=10.0)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(torch.tensor([[1.0, -1.0]]))
        >>> penalty.value().item()  # the output on (1, 1) is what it was
        0.0
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(torch.tensor([[1.0, 0.0]]))
        >>> penalty.value().item()  # 1/2 * 10 * 2 * 1^2
        10.0

    References:
        Ritter et al., "Online structured Laplace approximations for overcoming catastrophic
        forgetting", arXiv:1805.07810.
    """

    mode: Literal["coupled"] = "coupled"

    def __init__(self, model: nn.Module, factors: Factors, strength: float | Tensor = 1.0) -> None:
        self._model = model = checked_module(model)
        reshard(model)
        self._pulls: dict[str, MatrixPull] = {}
        self._pulls = self._pulls_for(without_wrappers(_factors_of(factors), self._model))
        self.strength = strength
        self.estimator, self.sharing = _source_of(factors)

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The anchor by parameter name."""
        return {n: t for pull in self._pulls.values() for n, t in pull.named_anchor().items()}

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """A and G by the name of the weight; G is None for the identity."""
        return {name: (pull.inputs, pull.outputs) for name, pull in self._pulls.items()}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of every penalised weight and bias."""
        return [named for pull in self._pulls.values() for named in pull.parameters.items()]

    def terms(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """No elementwise term: this penalty mixes the entries of a weight."""
        return []

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Parameter and buffer of every weight and bias; :meth:`refresh` fills the buffers."""
        self._follow_sharding()
        return [pair for pull in self._pulls.values() for pair in pull.pairs()]

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Fill the buffers with the gradient at the parameters as they are; return the penalty."""
        return self._total([pull.pull_(self.strength) for pull in self._pulls.values()])

    def value(self) -> Tensor:
        """Return the penalty E, 0-d and differentiable, on the first parameter's device."""
        self._follow_sharding()
        return self._total([pull.value(self.strength) for pull in self._pulls.values()])

    def _total(self, values: list[Tensor]) -> Tensor:
        """Add up the values of all layers, and those of their rows in all processes."""
        weights = [next(iter(pull.parameters.values())) for pull in self._pulls.values()]
        return total_of(values, weights)

    def _follow_sharding(self) -> None:
        """Distribute what is kept as the model's parameters are, if they have been since."""
        held = {
            name: (param, pull.anchor if param.ndim > 1 else dict(pull.pairs())[param])
            for pull in self._pulls.values()
            for name, param in pull.parameters.items()
        }
        moved = sharded_since(self.__dict__.get("_model"), held)
        if moved:
            self._pulls = {
                name: pull.moved(pull.parameters | moved)
                if moved.keys() & pull.parameters.keys()
                else pull
                for name, pull in self._pulls.items()
            }
            self.version += 1

    @torch.no_grad()
    def consolidate(self, factors: Factors, *, decay: float = 1.0) -> None:
        r"""Add a task and anchor at the model as it is.

        :math:`G \otimes A` becomes the Kronecker product that is nearest to
        :math:`\gamma\, G \otimes A + G' \otimes A'` in the Frobenius norm.

        A layer that only one of the two has, such as a new head, has importance 0 in the other. One
        that the model has no more is dropped. Tensors keep their addresses, and an optimizer that
        holds this penalty goes on with it; give it new parameters by ``add_param_group`` first.

        Args:
            factors: A' and G' of the task that was learned last.
            decay: gamma in [0, 1], how much of the earlier tasks is kept.

        Raises:
            TypeError: As for the constructor. Nothing has changed then.
            ValueError: As for the constructor, or ``decay`` is out of range. Nothing has changed
                then.
        """
        decay = checked_decay(decay)
        found: Mapping[str, tuple[Tensor, Tensor | None]]
        found = without_wrappers(_factors_of(factors), self._model)
        self._follow_sharding()
        pulls = self._pulls_for(found)
        for name, pull in pulls.items():
            if name not in self._pulls:  # holds its first factors already
                continue
            if name in found:
                pull.consolidate(*found[name], decay=decay)
            else:
                pull.decay_(decay)
        self._set_pulls(pulls)
        source = _source_of(factors)
        if decay and source != (self.estimator, self.sharing):
            source = None, None  # of several
        self.estimator, self.sharing = source

    def _pulls_for(
        self, found: Mapping[str, tuple[Tensor, Tensor | None]]
    ) -> dict[str, MatrixPull]:
        """Return the pulls of the layers that are held or found, as far as the model has them.

        Args:
            found: Factors by the name of the weight. What is held already is checked against them,
                and is as it was; what is not gets them, anchored at the model as it is.

        Raises:
            ValueError: A name or a factor does not fit. Nothing has changed then.
        """
        held = {n: p for pull in self._pulls.values() for n, p in pull.parameters.items()}
        live = live_parameters(self._model, held)
        check_names(found, self._model, "factors")
        layers = matrix_layers(self._model)
        pulls = {}
        for name in live:
            pull = self._pulls.get(name)
            if pull is not None and name in found:
                pull.check("", *found[name])
            elif pull is None and name in found:
                layer = layers.get(name, MatrixLayer({}, None))
                pull = MatrixPull(name, layer.bias, live, *found[name], transposed=layer.transposed)
            if pull is not None:
                pulls[name] = pull
        without = [name for name, pull in pulls.items() if pull.outputs is None]
        if 0 < len(without) < len(pulls):
            raise ValueError(f"{without[0]!r} has no G, others have; give all layers one, or none")
        return pulls

    def _set_pulls(self, pulls: dict[str, MatrixPull]) -> None:
        """Hold these pulls from now on."""
        self.version += pulls.keys() != self._pulls.keys()
        self._pulls = pulls

    def state_dict(self) -> dict[str, Any]:
        """Options, and references to the anchor [W b], A and G by the name of the weight."""
        state: dict[str, Any] = {
            "strength": float(self.strength),
            "estimator": self.estimator,
            "sharing": self.sharing,
            "anchor": {name: pull.anchor for name, pull in self._pulls.items()},
            "inputs": {name: pull.inputs for name, pull in self._pulls.items()},
        }
        if any(pull.outputs is not None for pull in self._pulls.values()):
            state["outputs"] = {name: pull.outputs for name, pull in self._pulls.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state into this penalty's own tensors, whose addresses do not change.

        Layers of the model that the state holds and this penalty does not are taken in.

        Args:
            state: What :meth:`state_dict` returned, on any device.

        Raises:
            TypeError: An entry has the wrong type. Nothing has changed then.
            ValueError: The state is of another model or holds an invalid value. Nothing has changed
                then; the message names the first difference.
        """
        state, pulls = self._checked_state(state)
        self._set_pulls(pulls)
        self.strength = checked_strength(state["strength"])
        self.estimator, self.sharing = state["estimator"], state["sharing"]
        for name, pull in self._pulls.items():
            anchor = place_like(state["anchor"][name], pull.anchor)
            part_of(pull.anchor).copy_(part_of(anchor))
            pull.inputs.copy_(state["inputs"][name])
            if pull.outputs is not None:
                pull.outputs.copy_(state["outputs"][name])

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """See that a state can be loaded; nothing changes.

        Args:
            state: What :meth:`load_state_dict` would take.

        Raises:
            TypeError: An entry has the wrong type.
            ValueError: The state is of another model or holds an invalid value.
        """
        self._checked_state(state)

    def _checked_state(
        self, state: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], dict[str, MatrixPull]]:
        """The state by this model's own names, and the pulls that it is for."""
        self._follow_sharding()
        state = without_wrappers(state, self._model)
        options = {"strength", "estimator", "sharing"}
        parts = set(self.state_dict()) - options
        held = {name: pull.parameters[name] for name, pull in self._pulls.items()}
        named = parameters_in_state(state, "inputs", self._model, held)
        check_state("a KroneckerPenalty", state, options | parts, parts, named)
        checked_strength(state["strength"])
        check_label("estimator", state["estimator"])
        check_label("sharing", state["sharing"])
        outputs = state.get("outputs", {})
        for name, pull in self._pulls.items():
            pull.check("the state's ", state["inputs"][name], outputs.get(name))
        further = {
            name: (state["inputs"][name], outputs.get(name)) for name in named if name not in held
        }
        pulls = self._pulls | self._pulls_for(further)
        for name, pull in pulls.items():
            check_tensor(f"the state's anchor of {name!r}", state["anchor"][name], pull.anchor)
        return state, pulls


def _source_of(factors: Factors) -> tuple[str | None, str | None]:
    """Return estimator and sharing of a Fisher, None of what is not one."""
    if isinstance(factors, KroneckerFisher):
        return factors.estimator, factors.sharing
    return None, None


def _factors_of(factors: Factors) -> Mapping[str, tuple[Tensor, Tensor | None]]:
    if isinstance(factors, KroneckerFisher):
        return factors.factors
    if isinstance(factors, ActivationCovariance):
        layers = matrix_layers(factors.model)
        return {
            name: (moment if layers[name].bias is not None else moment[..., :-1, :-1], None)
            for name, moment in factors.augmented.items()
        }
    if not isinstance(factors, Mapping):
        raise TypeError(
            "factors must be a KroneckerFisher, an ActivationCovariance or a mapping from the "
            f"name of a weight to (A, G), got {type(factors).__name__}; "
            + (
                "an EWC takes that"
                if hasattr(type(factors), "importance")
                else "fit one of the two"
            )
        )
    if not factors:
        raise ValueError("factors is empty: there is nothing to penalise")
    for name, pair in factors.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"the factors of {name!r} must be a pair (A, G), got {type(pair).__name__}"
            )
    return factors
