"""Where each number lies in the device buffers that host and kernels share: no torch, no Triton."""

from enum import IntEnum


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
    """Columns of the address table, int64, one row per tensor; address 0 is an absent operand."""

    PARAM = 0
    EXP_AVG = 1
    EXP_AVG_SQ = 2
    MAX_EXP_AVG_SQ = 3
    ANCHOR = 4
    IMPORTANCE = 5
    STEP = 6
    PRODUCTS = 7
    NUMEL = 8
    GROUP = 9
    PULL = 10  # a gradient of the penalty that is not elementwise
    REMAINDER = 11  # of a master weight
    SCALE = 12  # of a uint8 importance
    NUMBER = 13  # of the parameter in its optimizer
    PRODUCTS_STEP = 14  # how many steps the products are of
