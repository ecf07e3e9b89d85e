"""What a step works on, and where each number lies in the buffers that host and kernels share.

Without Triton, so that the other implementations of the step can use it.
"""

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors of one parameter's update, its gradient apart; all on one device.

    Args:
        param: The parameter, dense: float16, bfloat16, float32 or float64.
        exp_avg: First moment, of the parameter's shape and memory order, like all that has its
            shape. float32; float64 for a float64 parameter; bfloat16 for a bfloat16 parameter that
            is rounded stochastically.
        exp_avg_sq: Second moment, likewise.
        step: Steps taken, one element, float32.
        max_exp_avg_sq: Running maximum of the second moment, likewise; None without amsgrad.
        products: Products of the betas so far, (2,) float64; None unless a gate makes the betas
            vary.
        products_step: How many steps these are of, 0-d float32; likewise. Where that is not the
            steps taken, the powers of the betas take the products' place.
        anchor: Where the penalty pulls, of any float dtype; None without a penalty.
        importance: How hard, >= 0; of any float dtype, or uint8 if there is a scale; None in the
            same places.
        scale: Of a uint8 importance, (ceil(numel / 64),) float32: Omega_i is
            ``scale[i // 64] * (q_i / 255) ** 2``, with i counting the elements of a contiguous
            parameter. None for others.
        pull: Gradient of a penalty, added to the task's after unscaling, clipping and the sign;
            float32, or float64 for a float64 parameter; None without one. Read at every step.
        remainder: What a bfloat16 parameter lacks to be a float32 master weight, int16, see
            :func:`ars.reference.split_master`; None for others.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    max_exp_avg_sq: Tensor | None = None
    products: Tensor | None = None
    products_step: Tensor | None = None
    anchor: Tensor | None = None
    importance: Tensor | None = None
    scale: Tensor | None = None
    pull: Tensor | None = None
    remainder: Tensor | None = None


class Hyper(IntEnum):
    """Columns of the hyperparameters, float64, one row per parameter group; the caller fills it."""

    LR = 0
    BETA1 = 1
    BETA2 = 2
    EPS = 3
    WEIGHT_DECAY = 4
    STRENGTH = 5  # EWC's lambda
    MAX_NORM = 6  # of all gradients together; infinity does not clip
    SIGN = 7  # of the gradient, +1 to minimise, -1 to maximise, times any further factor
    BETA_FACTOR = 8  # of the betas, besides the controller's: 1, or a gate that is known already


class Config(IntEnum):
    """Entries of the controller's constants, float64."""

    ALPHA = 0
    PHI_MIN = 1
    EPS = 2
    JITTER = 3
    THRESHOLD = 4
    SIGNIFICANCE = 5
    RESONANCE = 6
    RELEASE = 7
    ALTERNATING = 8  # 1: only a negative autocorrelation is resonance
    FIRST_RELEASE = 9


class GateState(IntEnum):
    """Entries of what the controller's gate remembers, float64."""

    PHI = 0  # of the step before
    SLOW = 1  # 1: it opens over RELEASE, 0: over FIRST_RELEASE
    DEVIATION = 2  # the trend's standard error at the alarm, 0 once the gate is open
    MEAN = 3  # running mean of the surprises since the alarm
    LOWEST = 4  # the least such mean


class Diagnostic(IntEnum):
    """Entries of what a step reports, float64; lr and the betas are group 0's, after the gate."""

    SURPRISE = 0
    RHO = 1
    PSI = 2
    PHI = 3
    CHI = 4
    LR = 5
    BETA1 = 6
    BETA2 = 7
    GRAD_NORM = 8
    PENALTY = 9


class Scalar(IntEnum):
    """Columns of what the step reads, one row per group; written by the control kernel."""

    BETA1 = 0
    ONE_MINUS_BETA1 = 1
    BETA2 = 2
    ONE_MINUS_BETA2 = 3
    DECAY = 4  # 1 - lr * weight_decay when decoupled, else weight_decay
    EPS = 5
    STRENGTH = 6
    CLIP = 7  # clip coefficient times SIGN, divided by the loss scale
    METRIC = 8  # lr * strength, of the proximal step
    SKIP = 9  # in the first row: 1 if nothing may move


class Correction(IntEnum):
    """Columns of the bias corrections, one row per tensor; written by the control kernel."""

    STEP_SIZE = 0  # lr / c1
    INVERSE_ROOT = 1  # 1 / sqrt(c2)


class Table(IntEnum):
    """Columns of the address table, int64, one row per tensor; address 0 is an absent operand.

    First the addresses of :class:`Operands`, in that order.
    """

    PARAM = 0
    EXP_AVG = 1
    EXP_AVG_SQ = 2
    STEP = 3
    MAX_EXP_AVG_SQ = 4
    PRODUCTS = 5
    PRODUCTS_STEP = 6
    ANCHOR = 7
    IMPORTANCE = 8
    SCALE = 9
    PULL = 10
    REMAINDER = 11
    NUMEL = 12
    GROUP = 13
    NUMBER = 14  # of the parameter in its optimizer
