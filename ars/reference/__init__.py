"""The definition of every operation, in plain torch: the oracle each kernel is compared with.

Nothing here needs Triton or a GPU, and every function runs in the precision of what it is given,
so a float64 call is the closed form to compare against. Scalars may be Python floats or 0-d
tensors; 0-d tensors keep a step free of host synchronisation.

The equations are numbered as the kernels cite them: controller (1) rho, (2) Psi, (3) Phi, (4) chi;
Adam (5) moments, (6) bias-correction product, (7) update; penalties (8) EWC coupled, (9) EWC
proximal, (10) subspace, (12) Kronecker-factored; Fisher (11) per-sample squares.
"""

from ars.reference.adam import (
    AdamResult,
    adam_denominator,
    adam_step,
    clip_coefficient,
    grad_norm,
    next_product,
)
from ars.reference.controller import (
    GateState,
    Signals,
    back_off,
    chronos_jitter,
    controller_step_,
    draw,
    entropy_guard,
    slow_release,
    surprise_gate,
)
from ars.reference.fisher import squared_products
from ars.reference.penalties import (
    SCALED,
    decode_importance,
    ewc_gradient,
    ewc_proximal,
    ewc_value,
    kronecker_gradient,
    kronecker_value,
    subspace_gradient,
    subspace_value,
)
from ars.reference.rounding import (
    join_master,
    philox,
    philox_uniform,
    rounding_bits,
    split_master,
    stochastic_round,
)
from ars.reference.scalars import Scalar, read

__all__ = [
    "SCALED",
    "AdamResult",
    "GateState",
    "Scalar",
    "Signals",
    "adam_denominator",
    "adam_step",
    "back_off",
    "chronos_jitter",
    "clip_coefficient",
    "controller_step_",
    "decode_importance",
    "draw",
    "entropy_guard",
    "ewc_gradient",
    "ewc_proximal",
    "ewc_value",
    "grad_norm",
    "join_master",
    "kronecker_gradient",
    "kronecker_value",
    "next_product",
    "philox",
    "philox_uniform",
    "read",
    "rounding_bits",
    "slow_release",
    "split_master",
    "squared_products",
    "stochastic_round",
    "subspace_gradient",
    "subspace_value",
    "surprise_gate",
]
