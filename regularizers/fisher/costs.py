r"""What one sample costs by itself, in counts of operations and bytes: is the loop the fastest?

The loop over samples pays for every sample, beyond the work that all ways share,

    extra = OPERATOR * (operators) + BYTE * 24 * (parameters)

the calls, and six passes over the parameters: weights are read forwards and backwards, a gradient
is written and read, and its square is added to a sum. The work of a forward and backward pass is

    work = 3 * (operations of products + BYTE * (bytes written))

in operations. Where ``extra`` is a small part of ``work`` no way is faster, as the one pass for all
samples has its proofs to make, and vmap every sample's gradient to write.

Nothing is timed, so a fit is as repeatable as its sums, and processes that see samples of the same
shapes go the same way.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ars.regularizers.fisher.samples import Samples

__all__ = ["Cost", "cost_of", "loop_is_cheap"]

# In operations: a call forwards with its part backwards, and a byte of memory. For a core that does
# 5e10 operations and moves 1e10 bytes a second, with 20 microseconds a call; for a GPU that does
# 5e13 and moves 3e12, with as much a call.
_OPERATOR = {"cpu": 1e6}
_BYTE = {"cpu": 5.0}
_GPU_OPERATOR, _GPU_BYTE = 1e9, 17.0
# Part of the work that the loop may cost more: the one pass costs 1.1 to 1.6 times the work,
# according to the number of batches that share its proofs.
SHARE = 0.25


class Cost(NamedTuple):
    """Of one sample's forward pass.

    Args:
        operators: Calls that compute something.
        operations: Of matrix products and convolutions.
        written: Bytes.
    """

    operators: int
    operations: int
    written: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost(0, 0, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            count = flop_registry.get(func._overloadpacket)
            operations = count(*args, **(kwargs or {}), out_val=output) if count else 0
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            written = sum(t.numel() * t.element_size() for t in outputs if isinstance(t, Tensor))
            before = self.cost
            self.cost = Cost(
                before.operators + 1, before.operations + operations, before.written + written
            )
        return output


def cost_of(model: nn.Module, one: Samples) -> Cost:
    """Count what a forward pass of one sample does.

    Args:
        model: In evaluation mode.
        one: One sample.
    """
    # With a graph, as without one attention may take kernels that are not differentiated.
    with torch.enable_grad(), _Counter() as counter:
        one.run(model)
    return counter.cost


def loop_is_cheap(cost: Cost, parameters: Iterable[Tensor], device: torch.device) -> bool:
    """Whether single samples fill the operators so well that the loop is as fast as any way.

    Args:
        cost: Of one sample.
        parameters: Those to differentiate by.
        device: Where the model runs.
    """
    operator = _OPERATOR.get(device.type, _GPU_OPERATOR)
    byte = _BYTE.get(device.type, _GPU_BYTE)
    extra = operator * cost.operators + 24 * byte * sum(p.numel() for p in parameters)
    return extra <= SHARE * 3 * (cost.operations + byte * cost.written)
