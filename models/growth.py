r"""Growing a GPT into a larger one that computes the same function.

Let s = sqrt(D'/D), with the head width fixed. New heads, channels and hidden units are appended,
new blocks appended or inserted, every old weight is multiplied by a constant c, and the residual
stream becomes s [x; 0]:

    tensor                 old block   new rows         new columns
    wte                    1           -                0
    q, k, v, mlp.fc        1           initial law      initial law     (their inputs are 0)
    attn.proj              1           0                0
    mlp.proj               1/s         0                0               (relu^2 makes s^2 of s)
    lm_head                1/s         -                initial law     (their inputs are 0)
    appended blocks        -           initial law; attn.proj and mlp.proj 0
    inserted blocks        -           q, k, v and mlp.fc of the block before; attn.proj and
                                       mlp.proj 0; what their widening adds: initial law

What writes into the new channels starts at 0 and what reads them starts at random, so the logits do
not change, the gradient of every new write is non-zero at once, and that of every new read after
one step. The function is preserved up to rounding for every ``norm_eps`` (see
:class:`ars.models.GPT`); zero padding without s is not exact, because RMSNorm divides by the width.

Equal functions of theta and theta' = c theta have gradients g' = g / c, hence

    exp_avg' = exp_avg / c,   exp_avg_sq' = exp_avg_sq / c^2,
    Omega' = Omega / c^2,     anchor' = c anchor,     momentum_buffer' = momentum_buffer / c

and an EWC penalty 1/2 sum Omega (theta - anchor)^2 has the same value before and after.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ars.models.config import GPTConfig
from ars.models.gpt import GPT, initial_values
from ars.reference import join_master, split_master
from ars.sharded import is_sharded, place_as, reshard, whole

__all__ = ["Growth", "grow"]

Blocks: TypeAlias = Literal["appended", "inserted"]

_PACKED = ("state", "param_groups")  # the entries of every optimizer's state_dict
_REMAINDER = "param_remainder"  # what ARSAdamW(master_weights=True) keeps of a bfloat16 weight
# Power of 1/c by which each optimizer state of a parameter's shape transforms, after g' = g / c.
_MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1}


def _scale(name: str, stretch: float) -> float:
    return 1.0 / stretch if name.endswith("mlp.proj.weight") or name == "lm_head.weight" else 1.0


def _origins(old: int, new: int, blocks: Blocks) -> list[int | None]:
    """The parent's block that each block of the grown model comes from.

    Args:
        old: L, the parent's number of blocks.
        new: L' >= L.
        blocks: where the L' - L new ones go.

    Returns:
        L' numbers. Of equal ones the first is the parent's block and the others are copies of it;
        ``None`` is a block of new weights.

    Example:
        >>> _origins(4, 5, "appended"), _origins(4, 5, "inserted")
        ([0, 1, 2, 3, None], [0, 1, 1, 2, 3])
        >>> _origins(4, 6, "inserted"), _origins(2, 4, "inserted")
        ([0, 1, 1, 2, 2, 3], [0, 0, 1, 1])
    """
    added = new - old
    if blocks == "appended":
        return [*range(old), *[None] * added]
    # The j-th of k new blocks follows the share j / (k + 1) of the old ones, rounded up: evenly
    # spread, and never before the first, which has no block before it to copy.
    before = [-(-j * old // (added + 1)) for j in range(1, added + 1)]
    return sorted([*range(old), *(count - 1 for count in before)])


def _grown_name(name: str, origins: list[int | None]) -> str:
    if not name.startswith("blocks."):
        return name
    _, block, rest = name.split(".", 2)
    return f"blocks.{origins.index(int(block))}.{rest}"


def _check_growth(old: GPTConfig, new: GPTConfig) -> None:
    kept = {"vocab_size": "tokens", "norm_eps": "the norms", "rope_base": "positions"}
    for name, meaning in kept.items():
        if getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"{name} changes from {getattr(old, name)} to {getattr(new, name)}; growth keeps "
                f"{meaning}, so set {name}={getattr(old, name)}"
            )
    for field in fields(GPTConfig):
        if field.name not in kept and getattr(new, field.name) < getattr(old, field.name):
            raise ValueError(
                f"{field.name} shrinks from {getattr(old, field.name)} to "
                f"{getattr(new, field.name)}; growth cannot drop capacity, so set it to at least "
                f"{getattr(old, field.name)}"
            )
    if old.head_dim != new.head_dim:
        raise ValueError(
            f"head_dim = n_embd / n_head changes from {old.head_dim} to {new.head_dim}; rotary "
            f"and softmax scales depend on it, so set n_embd = {old.head_dim} * n_head"
        )


@dataclass(frozen=True, eq=False)
class Growth:
    r"""A grown model and the map that carries everything measured on its parent.

    Made by :func:`grow`. Names are those of ``named_parameters()``. An old parameter keeps its
    name, unless blocks were inserted before it; ``names`` says what it is called now. Its old
    coordinates are the leading block of the new tensor.

    Args:
        parent: the model that was grown; read, never modified.
        model: the grown model, on the parent's device and in its dtype.
        scales: the parent's name -> c, of every parameter of the parent: new = c old on the old
            block.
        initial: the grown model's name -> copy of its values at growth, the anchors of new
            coordinates.
        names: the parent's name -> the grown model's, of every parameter of the parent.
    """

    parent: GPT
    model: GPT
    scales: Mapping[str, float]
    initial: Mapping[str, Tensor]
    names: Mapping[str, str]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; where pickles of version 0.1.0 lack ``names``, parameters keep theirs."""
        self.__dict__.update({"names": {name: name for name in state["scales"]}} | state)

    def importance(self, importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the parent's importance, Omega' = Omega / c^2, with 0 on every new coordinate.

        The copies of blocks are new: they write nothing, so no function depends on what they read.

        Args:
            importance: the parent's name -> tensor of the parameter's shape, any floating dtype.
                Parameters of the parent that it leaves out are left out of the result.

        Returns:
            The grown model's name -> tensor of its shape, in the dtype and on the device given;
            fp32 zeros on the parameter's device for parameters that the parent did not have.

        Raises:
            ValueError: a name or a shape is not the parent's.
        """
        self._check_named(importance)
        mapped = {}
        sources = {name: source for source, name in self.names.items()}
        for name, weight in self.initial.items():
            source = sources.get(name)
            if source is None:
                mapped[name] = torch.zeros_like(weight, dtype=torch.float32)
            elif source in importance:
                old = whole(importance[source])
                grown = _embed(old / self.scales[source] ** 2, old.new_zeros(weight.shape))
                mapped[name] = _placed_likewise(grown, importance[source], weight)
        return mapped

    def anchor(self, anchor: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the parent's anchor, c anchor, with the initial values on every new coordinate.

        The initial values are those at growth, also if the grown model was trained meanwhile.

        Args:
            anchor: like the argument of :meth:`importance`.

        Returns:
            The grown model's name -> tensor of its shape, in the dtype and on the device given; the
            initial values of parameters that the parent did not have.

        Raises:
            ValueError: a name or a shape is not the parent's.
        """
        self._check_named(anchor)
        mapped = {}
        sources = {name: source for source, name in self.names.items()}
        for name, weight in self.initial.items():
            source = sources.get(name)
            if source is None:
                mapped[name] = weight.clone()
            elif source in anchor:
                old = whole(anchor[source])
                grown = _embed(self.scales[source] * old, whole(weight).to(old))
                mapped[name] = _placed_likewise(grown, anchor[source], weight)
        return mapped

    def optimizer_state(
        self, old_optimizer: torch.optim.Optimizer, new_optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Map the state of an optimizer of the parent to one of the grown model.

        For Adam-like optimizers, and for those with a momentum_buffer (:class:`torch.optim.SGD`,
        :class:`torch.optim.Muon`), alone or inside an :class:`ars.ARSOptimizer`. Where several
        optimizers share a model, each is mapped by itself to its counterpart.

        On old blocks exp_avg / c and exp_avg_sq / c^2 (max_exp_avg_sq alike), so that an Adam step
        moves an old block as far as in the parent. On new coordinates of an old tensor exp_avg is
        0, which ramps their updates up over 1 / (1 - beta1) steps, as the tensor keeps its step
        count. Their exp_avg_sq is the largest of the mapped means of the tensor, of the
        coordinate's old row and of its old column: after 0 the first update would be
        (1 - beta1) / sqrt(1 - beta2) lr, 3.2 lr for the usual betas, and after the tensor's mean
        that of frequent tokens exceeds lr. momentum_buffer goes like exp_avg: / c, and 0 on new
        coordinates. Muon cancels c, as Adam does; SGD moves the old block 1/c times as far as in
        the parent. Scalars and vectors (step, products of betas) are per tensor and copied.

        A parameter that the parent did not have gets no state and starts at step 0. That holds for
        the copies of inserted blocks, too: their reads have no gradient at first, since they write
        nothing, and the moments of the block they were copied from would move them all the same.

        Hyperparameters are those of ``new_optimizer``; other top-level entries of the old
        state_dict are copied.

        Master weights (bfloat16 weights with a ``param_remainder``) grow as the 32-bit numbers they
        are, c times each and split again, bit for bit what growing the float32 model gives. That
        sets the old blocks of ``model`` and of ``initial`` too: :func:`grow` saw the upper halves
        alone, and c times these can be a unit off.

        Args:
            old_optimizer: optimizer of (some of) the parent's parameters; its state may be empty.
            new_optimizer: optimizer of (some of) the grown model's parameters, at least of those
                whose state ``old_optimizer`` has; grouped in any way.

        Returns:
            A dictionary for ``new_optimizer.load_state_dict``.

        Raises:
            ValueError: an optimizer holds a parameter that is not its model's, ``new_optimizer``
                lacks a parameter that has state, a matrix-shaped state entry is unknown, or
                the parent has master weights and either model was changed since growth.

        Example:
            >>> parent = GPT(GPTConfig(9, 8, n_layer=1, n_head=1, n_embd=8))
            >>> growth = grow(parent, GPTConfig(9, 8, n_layer=2, n_head=2, n_embd=16))
            >>> old = torch.optim.AdamW(parent.parameters())
            >>> parent(torch.zeros(1, 8, dtype=torch.int64)).logsumexp(-1).sum().backward()
            >>> old.step()
            >>> new = torch.optim.AdamW(growth.model.parameters())
            >>> new.load_state_dict(growth.optimizer_state(old, new))
            >>> new.state[growth.model.wte.weight]["exp_avg"].shape
            torch.Size([9, 16])
        """
        for model in (self.parent, self.model):
            reshard(model)
        old_state = old_optimizer.state_dict()
        new_state = new_optimizer.state_dict()
        old_names = _parameter_names(old_optimizer, old_state, self.parent, "old_optimizer")
        new_names = _parameter_names(new_optimizer, new_state, self.model, "new_optimizer")
        new_index = {name: index for index, name in new_names.items()}
        mapped = {}
        masters = {}
        for index, state in old_state["state"].items():
            name = old_names[index]
            grown = self.names[name]
            if grown not in new_index:
                raise ValueError(
                    f"new_optimizer does not hold {grown!r}, whose state old_optimizer has; "
                    "build it over growth.model.parameters()"
                )
            entries = {
                key: self._map_entry(name, key, value)
                for key, value in state.items()
                if key != _REMAINDER
            }
            if _REMAINDER in state:
                masters[grown] = self._grow_master(name, state[_REMAINDER])
                entries[_REMAINDER] = masters[grown][1]
            mapped[new_index[grown]] = entries
        for name, (weight, _) in masters.items():  # after all checks
            with torch.no_grad():
                self.model.get_parameter(name).copy_(weight)
                self.initial[name].copy_(weight)
        extra = {key: deepcopy(value) for key, value in old_state.items() if key not in _PACKED}
        return {**new_state, **extra, "state": mapped}

    def _map_entry(self, name: str, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim <= 1:
            return deepcopy(value)
        if key not in _MOMENTS:
            raise ValueError(
                f"optimizer state {key!r} of {name!r} has shape {tuple(value.shape)} and no known "
                f"rule of growth; only {sorted(_MOMENTS)} can be mapped"
            )
        self._check_shape(name, value)
        initial = self.initial[self.names[name]]
        moment = _grow_moment(key, whole(value), self.scales[name], initial.shape)
        return _placed_likewise(moment, value, initial)

    def _grow_master(self, name: str, remainder: Tensor) -> tuple[Tensor, Tensor]:
        """The grown weight and its remainder.

        Raises:
            ValueError: either model was changed since growth, or a shape is not the parent's.
        """
        self._check_shape(name, remainder)
        grown, scale = self.names[name], self.scales[name]
        old, initial = whole(self.parent.get_parameter(name)), whole(self.initial[grown])
        weight, lower = _grow_master(old, whole(remainder), scale, initial)
        current = whole(self.model.get_parameter(grown))
        left = (_embed(scale * old, initial), weight)  # by grow, or by an earlier call
        if not any(_same_bits(current, expected) for expected in left):
            raise ValueError(
                f"{name!r} of the parent or of the grown model was changed after growth, so its "
                "master weight cannot be grown; take the optimizer's state before that"
            )
        like = self.initial[grown]
        return place_as(weight, like), place_as(lower, like)

    def _check_named(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            if name not in self.scales:
                raise ValueError(
                    f"{name!r} is not a parameter of the parent; pass tensors named by its "
                    "named_parameters()"
                )
            self._check_shape(name, value)

    def _check_shape(self, name: str, value: Tensor) -> None:
        expected = self.parent.get_parameter(name).shape
        if value.shape != expected:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)}, but the parent's parameter has "
                f"{tuple(expected)}"
            )


def _placed_likewise(grown: Tensor, old: Tensor, weight: Tensor) -> Tensor:
    """Shard what was made of an old tensor as the grown weight is, if the old one was sharded."""
    return place_as(grown, weight) if is_sharded(old) else grown


def _same_bits(a: Tensor, b: Tensor) -> bool:
    same_kind = a.dtype == b.dtype == torch.bfloat16
    return same_kind and torch.equal(a.view(torch.int16), b.to(a.device).view(torch.int16))


def _parameter_names(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], model: GPT, role: str
) -> dict[int, str]:
    # Parameters are matched by identity, whatever the groups and their order.
    names = {id(weight): name for name, weight in model.named_parameters()}
    indices = {}
    for group, packed in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for weight, index in zip(group["params"], packed["params"], strict=True):
            if id(weight) not in names:
                raise ValueError(
                    f"{role} holds a parameter of shape {tuple(weight.shape)} that is not in its "
                    "model; pass the optimizers of growth.parent and of growth.model, in this order"
                )
            indices[index] = names[id(weight)]
    return indices


def _embed(old: Tensor, rest: Tensor) -> Tensor:
    """Return a copy of ``rest`` (R', C') with its leading block replaced by ``old`` (R, C)."""
    grown = rest.clone()
    grown[: old.size(0), : old.size(1)] = old
    return grown


def _grow_moment(key: str, value: Tensor, scale: float, shape: torch.Size) -> Tensor:
    """Map a moment of a weight that is multiplied by c.

    On the old block exp_avg / c and exp_avg_sq / c^2. On new coordinates exp_avg is 0 and
    exp_avg_sq the largest of the mapped means of the tensor and of the coordinate's old row or
    column: rows of a frequent token have far larger gradients than the mean of the table.
    momentum_buffer goes like exp_avg.

    Args:
        key: a name in ``_MOMENTS``.
        value: (R, C).
        scale: c.
        shape: (R', C').

    Returns:
        (R', C'), in the dtype and on the device of ``value``.

    Example:
        >>> value = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
        >>> _grow_moment("exp_avg_sq", value, 2.0, torch.Size((3, 3))).tolist()
        [[1.0, 0.0, 0.5], [0.0, 0.0, 0.25], [0.5, 0.25, 0.25]]
    """
    old = value / scale ** _MOMENTS[key]
    if _MOMENTS[key] == 1:
        return _embed(old, old.new_zeros(shape))
    wide = old.double()  # a sum of many small squares loses them in bf16
    expected = wide.mean().expand(shape).clone()
    rows, columns = old.shape
    expected[:rows] = expected[:rows].maximum(wide.mean(1, keepdim=True))
    expected[:, :columns] = expected[:, :columns].maximum(wide.mean(0, keepdim=True))
    return _embed(old, expected.to(old.dtype))


def _grow_master(
    old: Tensor, remainder: Tensor, scale: float, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Multiply a master weight by c in float32, and split it again.

    Args:
        old: (R, C) bfloat16, the upper half of the master weight.
        remainder: (R, C) int16, the lower half.
        scale: c.
        rest: (R', C') bfloat16, whose new coordinates are kept: they have no lower half.

    Returns:
        (R', C') bfloat16 and (R', C') int16.

    Example:
        >>> old, remainder = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 3).short()
        >>> rest = torch.zeros(1, 2, dtype=torch.bfloat16)
        >>> _grow_master(old, remainder, 2.0, rest)
        (tensor([[2., 0.]], dtype=torch.bfloat16), tensor([[3, 0]], dtype=torch.int16))
    """
    upper, lower = split_master(scale * join_master(old, remainder))
    return _embed(upper, rest), _embed(lower, lower.new_zeros(rest.shape))


def _copied(names: Mapping[str, object], origins: list[int | None]) -> dict[str, str]:
    """The parent's weight that each read of an inserted block is a copy of."""
    copied = {}
    for place, origin in enumerate(origins):
        if origin is None or origins.index(origin) == place:
            continue
        beginning = f"blocks.{origin}."
        for name in names:
            if name.startswith(beginning) and not name.endswith("proj.weight"):  # writes stay 0
                copied[f"blocks.{place}.{name.removeprefix(beginning)}"] = name
    return copied


def _unfilled(model: GPT, config: GPTConfig, shard: Callable[[GPT], object] | None) -> GPT:
    """A grown model on the parent's device, in its dtype, whose values are still to come.

    Raises:
        ValueError: the parent is sharded, and how to shard the grown model is not said.
    """
    like = model.wte.weight
    if shard is None and any(map(is_sharded, model.parameters())):
        raise ValueError(
            "the model is sharded, and so must the grown one be: pass shard=, a function that "
            "shards it as yours was, such as lambda model: fully_shard(model, mesh=mesh)"
        )
    with torch.device("meta"):
        grown = GPT(config)
    grown.to(like.dtype).train(model.training)
    grown.recompute = model.recompute
    if shard is not None:
        shard(grown)  # before there are values: no process ever holds them all
    return grown.to_empty(device=like.device)


@torch.no_grad()
def grow(
    model: GPT,
    config: GPTConfig,
    generator: torch.Generator | None = None,
    *,
    blocks: Blocks = "appended",
    shard: Callable[[GPT], object] | None = None,
) -> Growth:
    r"""Grow a model to a larger configuration without changing its function.

    The rule is the table at the top of :mod:`ars.models.growth`. Random entries follow the initial
    law of a new model of the larger size, 1/sqrt(D') and not 1/sqrt(D).

    ``blocks="inserted"`` spreads the new blocks evenly between the old ones (one new block goes
    into the middle), each a copy of the block before it that writes nothing yet: of k new blocks
    the j-th follows ceil(j L / (k + 1)) of the L old ones. The old blocks are renumbered; see
    :attr:`Growth.names`.

    Args:
        model: the parent; not modified.
        config: the larger sizes. ``n_layer``, ``n_head``, ``n_embd`` and ``sequence_len`` may grow;
            the head width, ``vocab_size``, ``norm_eps`` and ``rope_base`` must be the parent's.
        generator: source of the new random weights, on any device; ``None`` uses torch's default
            generator of the CPU.
        blocks: where new blocks go and what they read at first: ``"appended"`` after the last, at
            random, or ``"inserted"`` between the old ones, as the block before them.
        shard: shards a model in place, as the parent was sharded, such as by ``fully_shard`` of
            each block and then of the whole; called on the grown model before it has values. All
            processes call :func:`grow`, which gathers one parameter at a time, and so do the
            methods of what it returns; new random weights are the first process's.

    Returns:
        The grown model with the maps for importance, anchor and optimizer state.

    Raises:
        TypeError: ``model`` is not a :class:`ars.models.GPT` or ``config`` not a ``GPTConfig``.
        ValueError: a size shrinks, a value that must stay changes, ``blocks`` is another word, or
            the model is sharded and ``shard`` is None.

    Example:
        >>> parent = GPT(GPTConfig(9, 8, n_layer=2, n_head=1, n_embd=8)).double()
        >>> larger = GPTConfig(9, 8, n_layer=3, n_head=2, n_embd=16)
        >>> growth = grow(parent, larger, blocks="inserted")
        >>> tokens = torch.arange(8)[None]
        >>> torch.allclose(growth.model(tokens), parent(tokens), rtol=0, atol=1e-12)
        True
        >>> growth.names["blocks.1.attn.q.weight"]
        'blocks.2.attn.q.weight'

    References:
        Shen et al., "Staged Training for Transformer Language Models", arXiv:2203.06211.
        Chen et al., "Net2Net", arXiv:1511.05641. Samragh et al., "Scaling Smart", arXiv:2409.12903.
    """
    if not isinstance(model, GPT):
        raise TypeError(f"model must be a GPT itself, unwrapped; got {type(model).__name__}")
    if not isinstance(config, GPTConfig):
        raise TypeError(f"config must be a GPTConfig, got {type(config).__name__}")
    if blocks not in get_args(Blocks):
        raise ValueError(f"blocks must be 'appended' or 'inserted', got {blocks!r}")
    _check_growth(model.config, config)
    reshard(model)
    stretch = math.sqrt(config.n_embd / model.config.n_embd)
    origins = _origins(model.config.n_layer, config.n_layer, blocks)
    scales = {name: _scale(name, stretch) for name, _ in model.named_parameters()}
    names = {name: _grown_name(name, origins) for name in scales}
    sources = {**_copied(scales, origins), **{new: old for old, new in names.items()}}
    grown = _unfilled(model, config, shard)
    for name, weight in grown.named_parameters():  # one whole tensor at a time
        device = torch.get_default_device() if generator is None else generator.device
        values = torch.empty(weight.shape, device=device)
        rest = initial_values(name, values, config.n_embd, generator)
        rest = rest.to(weight.device, weight.dtype)
        if name == "wte.weight":
            rest.zero_()
        if name in sources:
            old = model.get_parameter(sources[name])
            rest = _embed(scales[sources[name]] * whole(old), rest)
        weight.copy_(place_as(rest, weight, from_first=True))
    for name, old in model.named_parameters():
        grown.get_parameter(names[name]).requires_grad_(old.requires_grad)
    initial = {name: weight.detach().clone() for name, weight in grown.named_parameters()}
    return Growth(parent=model, model=grown, scales=scales, initial=initial, names=names)
