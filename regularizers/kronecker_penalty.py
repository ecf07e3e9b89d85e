r"""A quadratic pull towards an anchor, weighted by a Kronecker-factored Fisher.

    E = 1/2 lambda sum_l tr(G_l D_l A_l D_l^T),    D_l = [W_l b_l] - [W*_l b*_l]

The value and gradient are defined by :func:`ars.reference.kronecker_value` and
:func:`ars.reference.kronecker_gradient`.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ars.regularizers.checks import (
    check_label,
    check_names,
    check_state,
    check_tensor,
    checked_decay,
    checked_module,
    checked_strength,
    live_parameters,
    with_those_of,
)
from ars.regularizers.covariance import ActivationCovariance
from ars.regularizers.kronecker import KroneckerFisher
from ars.regularizers.layers import matrix_layers
from ars.regularizers.matrix_pull import MatrixPull
from ars.regularizers.strengthened import Strengthened

__all__ = ["KroneckerPenalty"]

Factors: TypeAlias = (
    KroneckerFisher | ActivationCovariance | Mapping[str, tuple[Tensor, Tensor | None]]
)


class KroneckerPenalty(Strengthened):
    r"""Elastic weight consolidation with a Kronecker-factored importance.

    .. math:: E = \tfrac12 \lambda \sum_l \operatorname{tr}(G_l\, D_l\, A_l\, D_l^T), \quad
              D_l = [W_l\; b_l] - [W^*_l\; b^*_l]

    over linear and convolution layers, with :math:`[W^*\,b^*]` (:attr:`anchor`) the model as it is
    now and :math:`\lambda` :attr:`strength`. A weighs the directions of a layer's inputs, G those
    of its outputs. Where :class:`~ars.regularizers.EWC` knows one number a weight, this knows that
    a weight may change as long as the layer's outputs on old inputs do not: on permuted digits it
    keeps 91 % where EWC keeps 66 (``examples/continual_digits.py``).

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
            column, with d the columns of the weight flattened from dimension 1 on; G is (p, p), or
            None everywhere for the identity.
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
        self._model = checked_module(model)
        self._pulls: dict[str, MatrixPull] = {}
        self._pulls = self._pulls_with(_factors_of(factors))
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
        return [pair for pull in self._pulls.values() for pair in pull.pairs()]

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Fill the buffers with the gradient at the parameters as they are; return the penalty."""
        return _sum([pull.pull_(self.strength) for pull in self._pulls.values()])

    def value(self) -> Tensor:
        """Return the penalty E, 0-d and differentiable, on the first parameter's device."""
        return _sum([pull.value(self.strength) for pull in self._pulls.values()])

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
        found = _factors_of(factors)
        pulls = self._pulls_with(found)
        for name, pull in pulls.items():
            if name not in self._pulls:  # holds its first factors already
                continue
            if name in found:
                pull.consolidate(*found[name], decay=decay)
            else:
                pull.decay_(decay)
        self._take(pulls)
        source = _source_of(factors)
        if decay and source != (self.estimator, self.sharing):
            source = None, None  # of several
        self.estimator, self.sharing = source

    def _pulls_with(
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
                bias = layers[name].bias if name in layers else None
                pull = MatrixPull(name, bias, live, *found[name])
            if pull is not None:
                pulls[name] = pull
        without = [name for name, pull in pulls.items() if pull.outputs is None]
        if 0 < len(without) < len(pulls):
            raise ValueError(f"{without[0]!r} has no G, others have; give all layers one, or none")
        return pulls

    def _take(self, pulls: dict[str, MatrixPull]) -> None:
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
        options = {"strength", "estimator", "sharing"}
        parts = set(self.state_dict()) - options
        held = {name: pull.parameters[name] for name, pull in self._pulls.items()}
        named = with_those_of(state, "inputs", self._model, held)
        check_state("a KroneckerPenalty", state, options | parts, parts, named)
        strength = checked_strength(state["strength"])
        check_label("estimator", state["estimator"])
        check_label("sharing", state["sharing"])
        outputs = state.get("outputs", {})
        for name, pull in self._pulls.items():
            pull.check("the state's ", state["inputs"][name], outputs.get(name))
        further = {
            name: (state["inputs"][name], outputs.get(name)) for name in named if name not in held
        }
        pulls = self._pulls | self._pulls_with(further)
        for name, pull in pulls.items():
            check_tensor(f"the state's anchor of {name!r}", state["anchor"][name], pull.anchor)
        self._take(pulls)
        self.strength = strength
        self.estimator, self.sharing = state["estimator"], state["sharing"]
        for name, pull in self._pulls.items():
            pull.anchor.copy_(state["anchor"][name])
            pull.inputs.copy_(state["inputs"][name])
            if pull.outputs is not None:
                pull.outputs.copy_(outputs[name])


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
            name: (moment if layers[name].bias is not None else moment[:-1, :-1], None)
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


def _sum(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values]).sum()
