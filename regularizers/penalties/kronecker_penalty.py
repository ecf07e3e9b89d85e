r"""A quadratic pull towards an anchor, weighted by a Kronecker-factored Fisher.

    E = 1/2 lambda sum_l tr(G_l D_l A_l D_l^T),    D_l = [W_l b_l] - [W*_l b*_l]

The value and gradient are defined by :func:`ars.reference.kronecker_value` and
:func:`ars.reference.kronecker_gradient`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ars.reference import kronecker_gradient, kronecker_value
from ars.regularizers.checks import check_can_differentiate, checked_module
from ars.regularizers.fisher.covariance import ActivationCovariance
from ars.regularizers.fisher.estimators import accumulation_dtype
from ars.regularizers.fisher.kronecker import KroneckerFactors, KroneckerFisher, nearest_product
from ars.regularizers.fisher.layers import matrix_layers
from ars.regularizers.penalties.penalty_base import (
    PenaltyBase,
    check_label,
    check_names,
    check_state,
    check_tensor,
    check_unmoved,
    checked_decay,
    checked_strength,
    live_parameters,
    parameters_in_state,
    sharded_since,
    without_wrappers,
)
from ars.regularizers.penalties.sharded_value import total_of, with_gradients
from ars.sharded import (
    divides,
    indices_here,
    is_placed_like,
    is_sharded,
    part_of,
    place_like,
    reshard,
    whole,
    with_part,
    with_rows,
)

__all__ = ["KroneckerPenalty"]

# How far a factor may be from its transpose, relative to its largest entry. Sums of outer products
# in float32 are off by about 1e-7; a factor stored in bfloat16 is symmetric as well.
ASYMMETRY = 1e-4

Factors: TypeAlias = (
    KroneckerFisher | ActivationCovariance | Mapping[str, tuple[Tensor, Tensor | None]]
)


class MatrixPull:
    """Anchor, factors and buffers of one weight and its bias.

    Args:
        name: Of the weight.
        bias: Name of the bias that belongs to it, or None.
        parameters: Both, by name.
        inputs: A, (d, d), or (d + 1, d + 1) with the bias.
        outputs: G, (p, p), or None for the identity.

    Raises:
        TypeError: A factor is not a floating-point tensor.
        ValueError: The weight is no matrix, A asks for a bias that there is not, or a factor has
            the wrong shape, or is not finite or not symmetric or has a negative diagonal.
    """

    _rows: Tensor | None = None  # what pickles of earlier versions do not hold

    def __init__(
        self,
        name: str,
        bias: str | None,
        parameters: Mapping[str, nn.Parameter],
        inputs: Tensor,
        outputs: Tensor | None,
    ) -> None:
        check_can_differentiate("building a penalty")
        weight = parameters[name]
        if weight.ndim < 2:
            raise ValueError(
                f"{name!r} has shape {tuple(weight.shape)} and is no matrix; leave it out, and "
                "restrain it with an EWC"
            )
        self.name = name
        rows, columns = len(weight), math.prod(weight.shape[1:])
        self._parts: dict[str, nn.Parameter] = {name: weight}
        if isinstance(inputs, Tensor) and inputs.shape == (columns + 1, columns + 1):
            if bias is None:
                raise ValueError(
                    f"A of {name!r} has {columns + 1} rows for {columns} columns and a bias, but "
                    "the weight's layer trains no bias; freeze a layer after its penalty is built, "
                    "or leave out the last row and column"
                )
            self._parts[bias] = parameters[bias]
        dtype = accumulation_dtype(weight.dtype)
        self._size = rows, columns + (len(self._parts) == 2)
        self._has_outputs = outputs is not None
        self.check("", inputs, outputs)
        _check_placement(self._parts)
        # Which rows of G belong to the rows that are here; None for all.
        self._rows = indices_here(weight, rows=True) if is_sharded(weight) else None
        self.anchor = with_rows(self._matrix().detach(), weight)
        self.inputs = inputs.detach().to(weight.device, dtype, copy=True)
        self.outputs = (
            None if outputs is None else outputs.detach().to(weight.device, dtype, copy=True)
        )
        self._buffers = {n: torch.zeros_like(p, dtype=dtype) for n, p in self._parts.items()}

    def check(self, source: str, inputs: Tensor, outputs: Tensor | None) -> None:
        """Refuse factors that are not those of this layer.

        Args:
            source: Begins the messages, such as ``"the state's "``.
            inputs: A.
            outputs: G or None.

        Raises:
            ValueError: G is missing, or there is one too many; or see the constructor.
        """
        if (outputs is not None) != self._has_outputs:
            raise ValueError(
                f"{source}G of {self.name!r} is {'missing' if self._has_outputs else 'too much'}: "
                "this penalty was built "
                f"{'with' if self._has_outputs else 'from activations, without'} output factors"
            )
        rows, columns = self._size
        _check_factor(f"{source}A of {self.name!r}", inputs, columns)
        if outputs is not None:
            _check_factor(f"{source}G of {self.name!r}", outputs, rows)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The weight, and the bias if it has a part, by name."""
        return self._parts

    def named_anchor(self) -> dict[str, Tensor]:
        """Return the anchor of the weight, and of the bias, by parameter name."""
        anchor = part_of(self.anchor)
        return {n: with_part(self._cut(anchor, n), part) for n, part in self._parts.items()}

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with its buffer."""
        return [(p, self._buffers[name]) for name, p in self._parts.items()]

    def value(self, strength: float | Tensor) -> Tensor:
        """Return the penalty of this layer, differentiable in its parameters: of its rows here."""
        self._check_unmoved()
        if self._rows is not None:
            with torch.no_grad():
                value = self.pull_(strength)
                gradients = [part_of(buffer).clone() for buffer in self._buffers.values()]
            return with_gradients(value, list(self._parts.values()), gradients)
        with torch.autocast(device_type=self.anchor.device.type, enabled=False):
            delta = self._matrix() - self.anchor
            return kronecker_value(delta, self.inputs, self.outputs, strength)

    def pull_(self, strength: float | Tensor) -> Tensor:
        """Write the gradient to the buffers; return the penalty of the rows that are here, 0-d."""
        self._check_unmoved()
        with torch.autocast(device_type=self.anchor.device.type, enabled=False):
            delta = self._matrix() - part_of(self.anchor)
            if self._rows is None or self.outputs is None:
                gradient = kronecker_gradient(delta, self.inputs, self.outputs, strength)
            else:  # G mixes the rows of all processes
                weight = next(iter(self._parts.values()))
                rows = whole(with_rows(delta @ self.inputs, weight)).to(delta)
                gradient = strength * (self.outputs[self._rows.to(delta.device)] @ rows)
            for name, buffer in self._buffers.items():
                part_of(buffer).copy_(self._cut(gradient, name))
            return 0.5 * torch.dot(delta.flatten(), gradient.flatten())

    def consolidate(self, inputs: Tensor, outputs: Tensor | None, decay: float) -> None:
        """Add checked factors to ``decay`` times the old ones, and anchor at the parameters."""
        inputs = inputs.detach().to(self.inputs)
        if self.outputs is None or outputs is None:
            self.inputs.mul_(decay).add_(inputs)
        else:
            old = KroneckerFactors(self.inputs, decay * self.outputs)
            new = KroneckerFactors(inputs, outputs.detach().to(self.outputs))
            nearest = nearest_product(old, new)
            self.inputs.copy_(nearest.inputs)
            self.outputs.copy_(nearest.outputs)
        part_of(self.anchor).copy_(self._matrix())

    def decay_(self, decay: float) -> None:
        """Multiply the importance with ``decay``, and anchor at the parameters."""
        (self.inputs if self.outputs is None else self.outputs).mul_(decay)
        part_of(self.anchor).copy_(self._matrix())

    def moved(self, parameters: Mapping[str, nn.Parameter]) -> "MatrixPull":
        """Return this pull for the same parameters that are placed in another way.

        Args:
            parameters: The parameters as they are placed now, by name.
        """
        name, *bias = self._parts
        first = bias[0] if bias else None
        pull = MatrixPull(name, first, parameters, self.inputs, self.outputs)
        part_of(pull.anchor).copy_(part_of(place_like(self.anchor, pull.anchor)))
        return pull

    def _check_unmoved(self) -> None:
        for name, buffer in self._buffers.items():
            check_unmoved(name, self._parts[name], buffer, same_dtype=True)

    def _matrix(self) -> Tensor:
        """Return a copy of the rows of [W b] that are here, in the dtype of the computation."""
        weight, *bias = map(part_of, self._parts.values())
        columns = [weight.flatten(1), *(b[:, None] for b in bias)]
        return torch.cat(columns, 1).to(accumulation_dtype(weight.dtype))

    def _cut(self, matrix: Tensor, name: str) -> Tensor:
        """Return the part of rows like those of [W b] that belongs to one of the two."""
        part = part_of(self._parts[name])
        if part.ndim == 1:
            return matrix[:, -1]
        return matrix[:, : math.prod(part.shape[1:])].view_as(part)


def _check_placement(parts: Mapping[str, nn.Parameter]) -> None:
    """Refuse a weight that is not divided by rows, and its bias with it.

    Raises:
        ValueError: That is so; names it.
    """
    weight_name, *others = parts
    weight: Any = parts[weight_name]
    if is_sharded(weight) and any(divides(p, rows=False) for p in weight.placements):
        raise ValueError(
            f"{weight_name!r} is sharded by columns, {tuple(weight.placements)}, and a Kronecker "
            "factor mixes these; shard it by rows, as fully_shard does, or restrain it with an EWC"
        )
    for name in others:
        if not is_placed_like(parts[name], weight):
            raise ValueError(
                f"{name!r} is not distributed as its {weight_name!r} is; shard both by rows, or "
                "leave the last row and column of A out"
            )


def _check_factor(what: str, factor: object, size: int) -> None:
    """Refuse what cannot be a second moment of ``size`` numbers.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: A wrong shape, a value that is not finite, or no second moment.
    """
    if not isinstance(factor, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(factor).__name__}")
    if not factor.is_floating_point():
        raise TypeError(f"{what} must be floating point, got {factor.dtype}")
    if factor.shape != (size, size):
        raise ValueError(
            f"{what} has shape {tuple(factor.shape)}, expected ({size}, {size}); "
            "fit it on the model as it is now"
        )
    if not factor.isfinite().all():
        raise ValueError(f"{what} is not finite; look for an overflow where it was computed")
    largest = factor.abs().max()
    if (factor - factor.T).abs().max() > ASYMMETRY * largest:
        raise ValueError(f"{what} is not symmetric; it must be a second moment")
    if (factor.diagonal() < 0).any():
        raise ValueError(f"{what} has a negative diagonal; mean squares are >= 0")


class KroneckerPenalty(PenaltyBase):
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
                bias = layers[name].bias if name in layers else None
                pull = MatrixPull(name, bias, live, *found[name])
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
