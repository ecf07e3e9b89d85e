"""What a step costs besides time: launches, host time, peak memory."""

import time
from collections.abc import Callable

import torch
from interleaved import synchronize
from torch.profiler import ProfilerActivity, profile

# Bytes per second of the data sheet, by what torch calls the device.
DATA_SHEET = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
}


def data_sheet_bandwidth(device: str) -> float | None:
    """Return the data sheet's bandwidth in bytes per second, None for an unknown device."""
    return DATA_SHEET.get(torch.cuda.get_device_name()) if device == "cuda" else None


def peak_memory(run: Callable[[], object]) -> int:
    """Return the most bytes a call holds beyond what was there before it.

    Counted from the allocator's events, which exist on a CPU as well.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(run: Callable[[], object], device: str) -> int | None:
    """Return how many kernels a call launches on a GPU; None on a CPU, which launches none."""
    if device != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    copies = ("Memcpy", "Memset")
    return sum(
        event.device_type() == on_device and not event.name().startswith(copies)
        for event in recorded.profiler.kineto_results.events()
    )


def host_seconds(run: Callable[[], object], device: str, rounds: int = 11) -> float | None:
    """Return the median time until a call returns, not waiting for a GPU; None on a CPU."""
    if device != "cuda":
        return None
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    synchronize(device)
    return sorted(seconds)[rounds // 2]
