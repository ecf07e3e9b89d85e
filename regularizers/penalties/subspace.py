r"""Subspace penalty: a pull of chosen directions of a weight's change, at low rank.

    R = gamma sum_W || Q (W - W*) ||_F^2,    Q = P or I - P,    P = U U^T

The value and gradient are defined by :func:`ars.reference.subspace_value` and
:func:`ars.reference.subspace_gradient`; here they are computed in place, for the step.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ars.reference import subspace_value
from ars.reference.penalties import Protect, Side
from ars.regularizers.checks import check_can_differentiate, checked_choice, checked_module
from ars.regularizers.fisher.covariance import ActivationCovariance
from ars.regularizers.penalties.bases import (
    activation_bases,
    check_bases,
    parameters_of_bases,
    weight_basis,
)
from ars.regularizers.penalties.penalty_base import (
    PenaltyBase,
    check_names,
    check_option,
    check_state,
    check_tensor,
    check_unmoved,
    checked_strength,
    copy_like,
    live_parameters,
    parameters_in_state,
    sharded_since,
    without_wrappers,
)
from ars.regularizers.penalties.sharded_value import total_of, with_gradients
from ars.sharded import (
    add_over_divided,
    indices_here,
    is_sharded,
    part_of,
    place_like,
    reshard,
)

__all__ = ["SubspacePenalty"]


class Restraint:
    """Anchor, basis and buffers of one weight, and the penalised part Q (W - W*) of its change.

    Args:
        param: W, (rows, ...), flattened from dimension 1 on.
        anchor: W*, of the parameter's shape and strides, in the dtype of the computation.
        basis: U, checked: (d, k), or int64 indices (k,).
        side: Side of the weight that U lies on.
        protect: Which part is penalised.
    """

    _here: Tensor | None = None  # what pickles of earlier versions do not hold

    def __init__(
        self, param: Tensor, anchor: Tensor, basis: Tensor, side: Side, protect: Protect
    ) -> None:
        check_can_differentiate("building a penalty")
        self.param, self.anchor, self.side, self.protect = param, anchor, side, protect
        self.buffer = torch.zeros_like(anchor)
        buffer = part_of(self.buffer)
        # A weight that is not contiguous is worked on as a contiguous matrix beside its buffer.
        dense = buffer if buffer.is_contiguous() else buffer.contiguous()
        self._matrix = dense.view(buffer.shape[0], math.prod(buffer.shape[1:]))
        # Which rows of U belong to the part of the weight that is here; None for all.
        on_rows = side == "output"
        self._here = indices_here(param, rows=on_rows) if is_sharded(param) else None
        self.set_basis(basis)

    def set_basis(self, basis: Tensor) -> None:
        """Copy U, which may have another k than the one before.

        Args:
            basis: U, checked.
        """
        matrix = self._matrix
        on = 0 if self.side == "output" else 1
        size = self.param.shape[0] if on == 0 else math.prod(self.param.shape[1:])
        if not basis.is_floating_point():
            self.basis = basis.detach().to(matrix.device, copy=True)
            inside = matrix.new_zeros(size).index_fill_(0, self.basis, 1.0)
            mask = self._part(inside if self.protect == "inside" else 1 - inside)
            self._mask = mask[:, None] if on == 0 else mask[None]
            return
        self.basis = basis.detach().to(matrix.device, matrix.dtype, copy=True)
        self._basis_here = self._part(self.basis)
        k = basis.shape[1]
        self._work = matrix.new_empty((k, matrix.shape[1]) if on == 0 else (matrix.shape[0], k))

    def value(self, strength: float | Tensor) -> Tensor:
        """Return the penalty of this weight, differentiable in it.

        Args:
            strength: gamma.
        """
        if self._here is not None:
            with torch.no_grad():
                square = self.pull_(2 * strength)
                gradient = part_of(self.buffer).clone()
            return with_gradients(strength * square, [self.param], [gradient])
        with torch.autocast(device_type=self.anchor.device.type, enabled=False):
            delta = (self.param - self.anchor).flatten(1)
            return subspace_value(delta, self.basis, strength, side=self.side, protect=self.protect)

    def pull_(self, scale: float | Tensor) -> Tensor:
        """Write ``scale`` Q (W - W*) to the buffer; return ||Q (W - W*)||_F^2, of what is here.

        Args:
            scale: Factor of what is written, not of what is returned.
        """
        param, buffer = part_of(self.param).detach(), part_of(self.buffer)
        matrix, basis = self._matrix, self.basis
        with torch.autocast(device_type=matrix.device.type, enabled=False):
            torch.sub(param, part_of(self.anchor), out=matrix.view(param.shape))
            if not basis.is_floating_point():
                square = _square(matrix.mul_(self._mask))
                matrix.mul_(scale)
            else:
                # U^T dW or dW U: an isometry of the part inside, whose norm is therefore its norm.
                on_rows = self.side == "output"
                basis = basis if self._here is None else self._basis_here
                factors = (basis.mT, matrix) if on_rows else (matrix, basis)
                inside = torch.mm(*factors, out=self._work)
                first = add_over_divided(inside, self.param, rows=on_rows)
                back = (basis, inside) if on_rows else (inside, basis.mT)
                if self.protect == "inside":
                    square = _square(inside) if first else inside.new_zeros(())
                    inside.mul_(scale)  # the smaller factor of the product
                    torch.mm(*back, out=matrix)
                else:
                    square = _square(matrix.addmm_(*back, alpha=-1))
                    matrix.mul_(scale)
        if matrix.data_ptr() != buffer.data_ptr():
            buffer.copy_(matrix.view(param.shape))
        return square

    def moved(self, param: Tensor) -> "Restraint":
        """Return this restraint for the same parameter that is placed in another way.

        Args:
            param: The parameter as it is placed now.
        """
        return Restraint(param, copy_like(param, self.anchor), self.basis, self.side, self.protect)

    def _part(self, basis: Tensor) -> Tensor:
        """Return the rows of U, or of a mask, that belong to the part of the weight here."""
        return basis if self._here is None else basis[self._here.to(basis.device)]


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor).square()


class SubspacePenalty(PenaltyBase):
    r"""Penalty on a weight's change inside, or outside, a subspace.

    .. math:: R = \gamma \sum_W \|Q\,(W - W^*)\|_F^2

    :math:`W^*` (:attr:`anchor`) is the model as it is now, :math:`\gamma` is :attr:`strength`, and
    with :math:`P = U U^T`:

    * ``protect="inside"``: Q = P, what the subspace spans is kept; ``"outside"``: Q = I - P, only
      the subspace may change.
    * ``side="input"``: :math:`(W - W^*) Q`, U lives in the space of the layer's inputs;
      ``"output"``: :math:`Q (W - W^*)`, in that of its outputs.

    To remember an old task keep the *inside* of the *input* subspace of its activations (the
    default): :math:`(W - W^*) a = 0` for every old input a. Others do not: on permuted digits the
    inputs' outside ends at 36 %, the outputs' inside at 56, no penalty at 48, this one at 90.
    ``"outside"`` has its use after growth, where U is the coordinates of the old model
    (:meth:`from_coordinates`) and the new capacity is what is restrained.

    Weights with more than two dimensions are flattened from dimension 1 on: a convolution's inputs
    are its patches, (channel, kernel). Vectors have no sides; restrain them with an
    :class:`~ars.regularizers.EWC`.

    An optimizer that takes a penalty calls :meth:`refresh` at the start of a step and adds the
    buffers of :meth:`gradients` after clipping: 4 k rows columns floating-point operations a
    weight, nothing of size d x d. With any other optimizer add :meth:`value` to the loss. To forbid
    the change rather than penalise it, call :meth:`project_` after each step. Memory: anchor and
    buffer, 8 bytes a parameter in float32, and U.

    Args:
        model: Its current parameters become the anchor.
        bases: Parameter name -> U, of shape (d, k), 1 <= k <= d, with orthonormal columns and d the
            size of ``side``; or int64 indices of k different coordinates, shape (k,).
        strength: gamma, in [0, 1e38]; a number or a 0-d tensor, read at every step.
        side: ``"input"`` or ``"output"``.
        protect: ``"inside"`` or ``"outside"``.

    Raises:
        TypeError: ``model`` is not a module, ``bases`` not a mapping, or a basis not a tensor.
        ValueError: No bases, an unknown name or option, a parameter with fewer than two dimensions,
            or a basis of the wrong shape or not orthonormal.

    Example:
        >>> import torch
        >>> from ars.regularizers import SubspacePenalty
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> first_input = torch.tensor([[1.0], [0.0]])
        >>> penalty = SubspacePenalty(model, {"weight": first_input}, strength=10.0)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(torch.tensor([[2.0, 5.0]]))
        >>> penalty.value().item()  # 10 * 2^2: the second input is free
        40.0

    References:
        Saha et al., "Gradient projection memory for continual learning", arXiv:2103.09762.
        Wang et al., "Training networks in null space of feature covariance", arXiv:2103.07113.
    """

    mode: Literal["coupled"] = "coupled"

    def __init__(
        self,
        model: nn.Module,
        bases: Mapping[str, Tensor],
        strength: float | Tensor = 1.0,
        *,
        side: Side = "input",
        protect: Protect = "inside",
    ) -> None:
        self._model = model = checked_module(model)
        reshard(model)
        self._parameters = parameters_of_bases(bases, model)
        self.side: Side = checked_choice("side", side, get_args(Side))
        self.protect: Protect = checked_choice("protect", protect, get_args(Protect))
        self.strength = strength
        check_bases(bases, self._parameters, side)
        self._restraints: dict[str, Restraint] = {}
        self._restraints = self._restraints_of(self._parameters, bases)

    @classmethod
    def from_weights(
        cls,
        model: nn.Module,
        strength: float | Tensor = 1.0,
        *,
        energy: float | None = None,
        rank: int | None = None,
        names: Iterable[str] | None = None,
        side: Side = "input",
        protect: Protect = "inside",
    ) -> "SubspacePenalty":
        """Take the span of each weight's leading singular vectors, without any data.

        Args:
            model: Its current weights are decomposed.
            strength: gamma.
            energy: Fraction of the squared singular values to keep, in (0, 1].
            rank: Instead of ``energy``: how many vectors, at most the weight's rank.
            names: Parameters; by default the trainable ones with two dimensions or more.
            side: ``"input"`` for the right singular vectors, ``"output"`` for the left ones.
            protect: ``"inside"`` or ``"outside"``.

        Returns:
            The penalty.
        """
        parameters = dict(checked_module(model).named_parameters())
        if names is None:
            names = [n for n, p in parameters.items() if p.ndim >= 2 and p.requires_grad]
        check_names(chosen := dict.fromkeys(names), model, "names")
        bases = {
            name: weight_basis(repr(name), parameters[name], side, energy=energy, rank=rank)
            for name in chosen
        }
        return cls(model, bases, strength, side=side, protect=protect)

    @classmethod
    def from_activations(
        cls,
        model: nn.Module,
        activations: ActivationCovariance | Mapping[str, Tensor] | Iterable[Any],
        strength: float | Tensor = 1.0,
        *,
        energy: float | None = None,
        rank: int | None = None,
        names: Iterable[str] | None = None,
        protect: Protect = "inside",
    ) -> "SubspacePenalty":
        """Take the span of the leading directions of each layer's inputs.

        Args:
            model: The model.
            activations: A fitted :class:`~ars.regularizers.ActivationCovariance` (merged, for
                several tasks), second moments (d, d) by parameter or module name, or the batches
                to fit one on.
            strength: gamma.
            energy: Fraction of the second moment to keep, in (0, 1].
            rank: Instead of ``energy``: how many directions, at most.
            names: Parameters; by default all that have a covariance.
            protect: ``"inside"`` or ``"outside"``.

        Returns:
            The penalty, on the input side.
        """
        bases = activation_bases(model, activations, names, energy=energy, rank=rank)
        return cls(model, bases, strength, side="input", protect=protect)

    @classmethod
    def from_coordinates(
        cls,
        model: nn.Module,
        coordinates: Mapping[str, int | Tensor],
        strength: float | Tensor = 1.0,
        *,
        side: Side = "input",
        protect: Protect = "outside",
    ) -> "SubspacePenalty":
        """Take the coordinates that a grown model has inherited: U is columns of the identity.

        Args:
            model: The grown model.
            coordinates: Parameter name -> the number of leading, old coordinates, or int64 indices.
            strength: gamma.
            side: ``"input"`` for columns, ``"output"`` for rows.
            protect: ``"outside"`` restrains the new coordinates, ``"inside"`` the old ones.

        Returns:
            The penalty; it needs no matrix products.
        """
        chosen = coordinates.items()
        bases = {n: torch.arange(max(c, 0)) if isinstance(c, int) else c for n, c in chosen}
        return cls(model, bases, strength, side=side, protect=protect)

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The anchor by parameter name."""
        return {name: r.anchor for name, r in self._restraints.items()}

    @property
    def bases(self) -> dict[str, Tensor]:
        """U by parameter name, in the dtype of the computation, or int64 indices."""
        return {name: r.basis for name, r in self._restraints.items()}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of every penalised weight, in the model's order."""
        return list(self._parameters.items())

    def terms(self) -> list[tuple[Tensor, ...]]:
        """No elementwise term: this penalty mixes the entries of a weight."""
        return []

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Parameter and buffer of every penalised weight; :meth:`refresh` fills the buffers."""
        self._follow_sharding()
        return [(r.param, r.buffer) for r in self._restraints.values()]

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Fill the buffers with the gradient at the parameters as they are; return the penalty."""
        squares = [r.pull_(2 * self.strength) for r in self._checked_restraints()]
        return self.strength * total_of(squares, [r.param for r in self._restraints.values()])

    def value(self) -> Tensor:
        """Return the penalty R, 0-d and differentiable, on the first parameter's device."""
        self._follow_sharding()
        squares = [r.value(1.0) for r in self._checked_restraints()]
        return self.strength * total_of(squares, [r.param for r in self._restraints.values()])

    def _checked_restraints(self) -> list[Restraint]:
        """Return the restraints, each of a parameter that is as it was when it was made."""
        for name, restraint in self._restraints.items():
            check_unmoved(name, restraint.param, restraint.buffer, same_dtype=True)
        return list(self._restraints.values())

    def _follow_sharding(self) -> None:
        """Distribute what is kept as the model's parameters are, if they have been since."""
        held = {name: (self._parameters[name], r.anchor) for name, r in self._restraints.items()}
        moved = sharded_since(self.__dict__.get("_model"), held)
        if moved:
            restraints = {
                name: r.moved(moved[name]) if name in moved else r
                for name, r in self._restraints.items()
            }
            self._parameters, self._restraints = self._parameters | moved, restraints
            self.version += 1

    @torch.no_grad()
    def consolidate(self, bases: Mapping[str, Tensor]) -> None:
        """Protect other bases, of all tasks so far, around the model as it is, in place.

        Args:
            bases: As for the constructor; another k is fine, and so are further parameters, such as
                a new head's. What the penalty holds must have one, unless the model has it no more.
                Where the constructor would raise, this does, and nothing has changed.
        """
        self._follow_sharding()
        live = live_parameters(self._model, self._parameters)
        kept = {name for name in self._parameters if name in live}
        held = parameters_of_bases(bases, self._model)
        parameters = {name: p for name, p in live.items() if name in kept or name in held}
        check_bases(bases, parameters, self.side)
        restraints = self._restraints_of(parameters, bases)
        for name in kept:
            part_of(restraints[name].anchor).copy_(part_of(restraints[name].param))
            restraints[name].set_basis(bases[name])
        self._set_restraints(parameters, restraints)

    def _restraints_of(
        self, parameters: Mapping[str, nn.Parameter], bases: Mapping[str, Tensor]
    ) -> dict[str, Restraint]:
        """Return the restraint of each parameter, anchored where it is if it is new."""
        return {
            name: self._restraints.get(name)
            or Restraint(p, copy_like(p, p), bases[name], self.side, self.protect)
            for name, p in parameters.items()
        }

    def _set_restraints(
        self, parameters: dict[str, nn.Parameter], restraints: dict[str, Restraint]
    ) -> None:
        """Hold these restraints from now on."""
        self.version += restraints.keys() != self._restraints.keys()
        self._parameters, self._restraints = parameters, restraints

    @torch.no_grad()
    def project_(self) -> None:
        """Remove the penalised part of the change: W <- W* + (I - Q)(W - W*), exactly.

        Call it after each ``opt.step()`` of an optimizer without this penalty: projecting gradients
        would not do, as Adam's step leaves their subspace.
        """
        for restraint in self._checked_restraints():
            restraint.pull_(1.0)
            part_of(restraint.param).sub_(part_of(restraint.buffer))

    def state_dict(self) -> dict[str, Any]:
        """Options, strength, and references to the anchor and basis tensors by parameter name."""
        return {
            "strength": float(self.strength),
            "side": self.side,
            "protect": self.protect,
            "anchor": self.anchor,
            "bases": self.bases,
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would, and change nothing.

        Args:
            state: What :meth:`state_dict` returned, on any device; its bases may have another k.

        Raises:
            TypeError: An entry has the wrong type.
            ValueError: Another model, side or kind, or a wrong value; names the first difference.
        """
        self._check_parts(without_wrappers(state, self._model))

    def _check_parts(self, state: Mapping[str, Any]) -> dict[str, nn.Parameter]:
        """Return the parameters that a state is of, all that this penalty holds among them."""
        self._follow_sharding()
        parameters = parameters_in_state(state, "bases", self._model, self._parameters)
        parts = {"anchor", "bases"}
        expected = {"strength", "side", "protect"} | parts
        check_state("a SubspacePenalty", state, expected, parts, parameters)
        checked_strength(state["strength"])
        check_option("side", state["side"], self.side)
        check_option("protect", state["protect"], self.protect)
        check_bases(state["bases"], parameters, self.side)
        for name, p in parameters.items():
            check_tensor(f"the state's anchor of {name!r}", state["anchor"][name], p)
        return parameters

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state that passes :meth:`check_state_dict`; anchor and buffers stay in place.

        Parameters of the model that the state holds and this penalty does not are taken in.

        Args:
            state: As for :meth:`check_state_dict`.
        """
        state = without_wrappers(state, self._model)
        parameters = self._check_parts(state)
        self._set_restraints(parameters, self._restraints_of(parameters, state["bases"]))
        self.strength = state["strength"]
        for name, restraint in self._restraints.items():
            anchor = place_like(state["anchor"][name], restraint.param)
            part_of(restraint.anchor).copy_(part_of(anchor))
            restraint.set_basis(state["bases"][name])
