r"""The controller, eqs. (1) to (4), as device functions of one program, all in float64.

The ring buffer is read in the order of age straight from memory, so its length is all that a
compilation depends on.

Oracle: :func:`ars.reference.controller_step_`.
"""

import triton
import triton.language as tl

from ars.csrc_triton.helpers import CONFIG, DIAGNOSTIC, GATE_STATE

__all__ = [
    "AVERAGED", "CLOSED_BY", "ERROR_FLOOR", "MIN_HISTORY", "OPEN", "RELATIVE_NOISE_FLOOR", "RISE",
    "observe",
]  # fmt: skip

# The reference's, which says why; a test keeps them equal.
RELATIVE_NOISE_FLOOR = tl.constexpr(1e-12)
MIN_HISTORY = tl.constexpr(10)
ERROR_FLOOR = tl.constexpr(1e-6)
AVERAGED = tl.constexpr(4)
RISE = tl.constexpr(2.0)
CLOSED_BY = tl.constexpr(0.5)
OPEN = tl.constexpr(0.9)


@triton.jit
def _fit(shifted, age, n, LINEAR: tl.constexpr):
    """Least-squares mean, slope and spread of ages; both arguments are 0 from the n-th entry on."""
    mean = tl.sum(shifted) / n
    if LINEAR:
        spread = tl.maximum(tl.sum(age * age), 0.5)
        slope = tl.sum(age * shifted) / spread
    else:
        spread = n * 0.0 + 0.5
        slope = n * 0.0
    return mean, slope, spread


@triton.jit
def _standardized_surprise(
    surprise, window, count, threshold,
    LINEAR: tl.constexpr, WINDOW: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
):  # fmt: skip
    """One-sided deviation from the trend of the window as it was, in standard errors."""
    valid = tl.minimum(count, WINDOW)
    oldest = (count - valid) % WINDOW
    index = tl.arange(0, WINDOW_BLOCK)
    used = index < valid
    values = tl.load(window + (oldest + index) % WINDOW, mask=used, other=0.0)
    start = tl.load(window + oldest)
    n = tl.maximum(valid, 1).to(tl.float64)
    # Subtracting the first value makes a constant window vary by exactly 0, whatever its level.
    shifted = tl.where(used, values - start, 0.0)
    age = tl.where(used, index.to(tl.float64) - (n - 1) / 2, 0.0)
    mean, slope, spread = _fit(shifted, age, n, LINEAR)
    residuals = tl.where(used, shifted - mean - slope * age, 0.0)
    ahead = (n + 1) / 2
    leverage = 1 + 1 / n
    freedom = n - 1
    if LINEAR:
        leverage += ahead * ahead / spread
        freedom -= 1
    error = tl.sqrt(tl.sum(residuals * residuals) / tl.maximum(freedom, 1.0) * leverage)
    predicted = start + mean + slope * ahead
    scale = error + ERROR_FLOOR * tl.abs(predicted)
    deviations = (surprise - predicted) / tl.where(scale > 0, scale, 1.0)
    deviations = tl.maximum(deviations - threshold, 0.0)
    return tl.where(valid >= MIN_HISTORY, deviations, 0.0), scale


@triton.jit
def _autocorrelation(
    surprise, finite, window, count,  # the new value and whether it counts; the window before it
    DETREND: tl.constexpr, WINDOW: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Lag-1 autocorrelation of the window with the new value in it, and how many are valid."""
    slot = tl.where(finite, count % WINDOW, -1)  # where the new value goes, if it does
    after = count + finite.to(tl.int64)
    valid = tl.minimum(after, WINDOW)
    oldest = (after - valid) % WINDOW
    index = tl.arange(0, WINDOW_BLOCK)
    used = index < valid
    paired = index + 1 < valid
    here = (oldest + index) % WINDOW
    there = (oldest + index + 1) % WINDOW
    x = tl.load(window + here, mask=used, other=0.0)
    y = tl.load(window + there, mask=paired, other=0.0)
    start = tl.load(window + oldest)
    # The new value is not in memory yet, so that no thread can miss it or see it too early.
    x = tl.where(used & (here == slot), surprise, x)
    y = tl.where(paired & (there == slot), surprise, y)
    scale = tl.max(tl.abs(x))

    x = tl.where(used, x - start, 0.0)
    y = tl.where(paired, y - start, 0.0)
    if DETREND:
        # The correlation does not see what both sides' means take out: intercepts, and the step
        # between a value's age and the next one's.
        n = tl.maximum(valid, 1).to(tl.float64)
        age = tl.where(used, index.to(tl.float64) - (n - 1) / 2, 0.0)
        _, slope, _ = _fit(x, age, n, True)
        x -= slope * age
        y -= slope * age
    pairs = tl.maximum(valid - 1, 1).to(tl.float64)
    x = tl.where(paired, x, 0.0)
    y = tl.where(paired, y, 0.0)
    x = tl.where(paired, x - tl.sum(x) / pairs, 0.0)
    y = tl.where(paired, y - tl.sum(y) / pairs, 0.0)
    xx = tl.sum(x * x)
    yy = tl.sum(y * y)
    noise = RELATIVE_NOISE_FLOOR * scale
    floor = pairs * (noise * noise)
    defined = (valid >= 3) & (xx > floor) & (yy > floor) & (xx + yy < float("inf"))
    rho = tl.sum(x * y) / tl.where(defined, tl.sqrt(xx) * tl.sqrt(yy), 1.0)
    return tl.where(defined, tl.minimum(tl.maximum(rho, -1.0), 1.0), 0.0), valid


@triton.jit
def _back_off(
    phi, surprise, finite, psi, deviation, phi_min, first_release, release,
    slow, sigma, mean, lowest, previous,
):  # fmt: skip
    """Return the gate's next state, as :func:`ars.reference.back_off`."""
    watching = sigma > 0
    follows = watching & finite
    moved = mean + (surprise - mean) / AVERAGED
    rises = follows & (moved > lowest + RISE * sigma)
    phi = tl.where(rises, phi_min, phi)
    alarm = finite & (rises | (phi < phi_min + CLOSED_BY * (previous - phi_min)))
    slow = (slow > 0) | (psi < 1) | (alarm & watching)
    limit = previous + (1 - previous) / tl.where(slow, release, first_release)
    phi = tl.where(phi < limit, phi, limit)
    opened = phi >= OPEN
    sigma = tl.where(watching, sigma, tl.where(alarm, deviation, 0.0))
    lowest = tl.where(follows & (moved < lowest), moved, lowest)
    mean = tl.where(follows, moved, mean)
    slow = tl.where(opened, 0.0, slow.to(tl.float64))
    sigma = tl.where(opened, 0.0, sigma)
    return phi, slow, sigma, tl.where(alarm, surprise, mean), tl.where(alarm, surprise, lowest)


@triton.jit
def observe(
    observed, window, counts, gate_state, config, seed, diagnostics,
    STANDARDIZE: tl.constexpr, DETREND: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Observe one surprise; return Phi and chi, float64."""
    eps = tl.load(config + CONFIG.value.EPS)
    alpha = tl.load(config + CONFIG.value.ALPHA)
    phi_min = tl.load(config + CONFIG.value.PHI_MIN)
    count = tl.load(counts)
    steps = tl.load(counts + 1)
    finite = tl.abs(observed) < float("inf")
    surprise = tl.where(finite, observed, 0.0)

    gated = tl.maximum(surprise, 0.0)
    if STANDARDIZE:
        threshold = tl.load(config + CONFIG.value.THRESHOLD)
        gated, deviation = _standardized_surprise(
            surprise, window, count, threshold, DETREND, WINDOW, WINDOW_BLOCK
        )
    # eq. 1
    rho, valid = _autocorrelation(surprise, finite, window, count, DETREND, WINDOW, WINDOW_BLOCK)
    significance = tl.load(config + CONFIG.value.SIGNIFICANCE)
    noise = significance / tl.sqrt(tl.maximum(valid, 1).to(tl.float64))
    strength = tl.maximum(tl.abs(rho) - noise, 0.0)
    rho = tl.where(rho < 0, -strength, tl.where(rho > 0, strength, 0.0))

    alternating = tl.load(config + CONFIG.value.ALTERNATING) != 0
    counted = tl.where(alternating, tl.minimum(rho, 0.0), rho)
    psi = tl.maximum(1 - counted * counted, eps)  # eq. 2
    resonance = tl.load(config + CONFIG.value.RESONANCE)
    strained = gated / psi + resonance * (1 / psi - 1)
    phi = phi_min + (1 - phi_min) * tl.exp(-alpha * strained)  # eq. 3
    phi = tl.where(finite, phi, phi_min)
    previous = tl.load(gate_state + GATE_STATE.value.PHI)
    slow = tl.load(gate_state + GATE_STATE.value.SLOW)
    sigma = tl.load(gate_state + GATE_STATE.value.DEVIATION)
    mean = tl.load(gate_state + GATE_STATE.value.MEAN)
    lowest = tl.load(gate_state + GATE_STATE.value.LOWEST)
    release = tl.load(config + CONFIG.value.RELEASE)
    limit = previous + (1 - previous) / release
    released = tl.where(phi < limit, phi, limit)
    if STANDARDIZE:  # nested, as the compiler reads both branches on a number it does not know
        first_release = tl.load(config + CONFIG.value.FIRST_RELEASE)
        if first_release < release:
            phi, slow, sigma, mean, lowest = _back_off(
                phi, surprise, finite, psi, deviation, phi_min, first_release, release,
                slow, sigma, mean, lowest, previous,
            )  # fmt: skip
        else:
            phi = released
    else:
        phi = released
    # The same counter and key as ars.reference.philox_uniform: the same number, bit for bit.
    counter = (steps & 0xFFFFFFFF).to(tl.uint32)
    zero = counter * 0
    word, _, _, _ = tl.philox(tl.load(seed), counter, zero, zero, zero)
    uniform = word.to(tl.float64) * 2.0**-32
    chi = tl.load(config + CONFIG.value.JITTER) * (2 * uniform - 1) * (1 - psi)  # eq. 4

    tl.debug_barrier()  # every thread has read the window, the counts and the gate state
    tl.store(window + count % WINDOW, surprise, mask=finite)
    tl.store(counts, count + finite.to(tl.int64))
    tl.store(counts + 1, steps + 1)
    tl.store(gate_state + GATE_STATE.value.PHI, phi)
    tl.store(gate_state + GATE_STATE.value.SLOW, slow)
    tl.store(gate_state + GATE_STATE.value.DEVIATION, sigma)
    tl.store(gate_state + GATE_STATE.value.MEAN, mean)
    tl.store(gate_state + GATE_STATE.value.LOWEST, lowest)
    tl.store(diagnostics + DIAGNOSTIC.value.SURPRISE, observed)
    tl.store(diagnostics + DIAGNOSTIC.value.RHO, rho)
    tl.store(diagnostics + DIAGNOSTIC.value.PSI, psi)
    tl.store(diagnostics + DIAGNOSTIC.value.PHI, phi)
    tl.store(diagnostics + DIAGNOSTIC.value.CHI, chi)
    return phi, chi
