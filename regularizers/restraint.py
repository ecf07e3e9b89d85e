r"""The penalised part Q (W - W*) of one weight's change, computed in place at low rank.

Oracle: :func:`ars.reference.subspace_value` and :func:`ars.reference.subspace_gradient`.
"""

import torch
from torch import Tensor

from ars.reference import subspace_value
from ars.reference.penalties import Protect, Side
from ars.regularizers.checks import check_can_differentiate

__all__ = ["Restraint"]


class Restraint:
    """Anchor, basis and buffers of one weight.

    Args:
        param: W, (rows, ...), flattened from dimension 1 on.
        anchor: W*, of the parameter's shape and strides, in the dtype of the computation.
        basis: U, checked: (d, k), or int64 indices (k,).
        side: Side of the weight that U lies on.
        protect: Which part is penalised.
    """

    def __init__(
        self, param: Tensor, anchor: Tensor, basis: Tensor, side: Side, protect: Protect
    ) -> None:
        check_can_differentiate("building a penalty")
        self.param, self.anchor, self.side, self.protect = param, anchor, side, protect
        self.buffer = torch.zeros_like(anchor)
        rows = param.shape[0]
        # A weight that is not contiguous is worked on as a contiguous matrix beside its buffer.
        dense = self.buffer if self.buffer.is_contiguous() else self.buffer.contiguous()
        self._matrix = dense.view(rows, -1)
        self.set_basis(basis)

    def set_basis(self, basis: Tensor) -> None:
        """Copy U, which may have another k than the one before.

        Args:
            basis: U, checked.
        """
        matrix = self._matrix
        on = 0 if self.side == "output" else 1
        if not basis.is_floating_point():
            self.basis = basis.detach().to(matrix.device, copy=True)
            shape = (-1, 1) if on == 0 else (1, -1)
            inside = matrix.new_zeros(matrix.shape[on]).index_fill_(0, self.basis, 1.0)
            self._mask = (inside if self.protect == "inside" else 1 - inside).view(shape)
            return
        self.basis = basis.detach().to(matrix.device, matrix.dtype, copy=True)
        k = basis.shape[1]
        self._work = matrix.new_empty((k, matrix.shape[1]) if on == 0 else (matrix.shape[0], k))

    def value(self, strength: float | Tensor) -> Tensor:
        """Return the penalty of this weight, differentiable in it.

        Args:
            strength: gamma.
        """
        with torch.autocast(device_type=self.anchor.device.type, enabled=False):
            delta = (self.param - self.anchor).flatten(1)
            return subspace_value(delta, self.basis, strength, side=self.side, protect=self.protect)

    def pull_(self, scale: float | Tensor) -> Tensor:
        """Write ``scale`` Q (W - W*) to the buffer; return ||Q (W - W*)||_F^2, 0-d.

        Args:
            scale: Factor of what is written, not of what is returned.
        """
        matrix, basis = self._matrix, self.basis
        with torch.autocast(device_type=matrix.device.type, enabled=False):
            torch.sub(self.param, self.anchor, out=matrix.view(self.param.shape))
            if not basis.is_floating_point():
                square = _square(matrix.mul_(self._mask))
                matrix.mul_(scale)
            else:
                # U^T dW or dW U: an isometry of the part inside, whose norm is therefore its norm.
                on_rows = self.side == "output"
                factors = (basis.mT, matrix) if on_rows else (matrix, basis)
                inside = torch.mm(*factors, out=self._work)
                back = (basis, inside) if on_rows else (inside, basis.mT)
                if self.protect == "inside":
                    square = _square(inside)
                    inside.mul_(scale)  # the smaller factor of the product
                    torch.mm(*back, out=matrix)
                else:
                    square = _square(matrix.addmm_(*back, alpha=-1))
                    matrix.mul_(scale)
        if matrix.data_ptr() != self.buffer.data_ptr():
            self.buffer.copy_(matrix.view(self.param.shape))
        return square


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor).square()
