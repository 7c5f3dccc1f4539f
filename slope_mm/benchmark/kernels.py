"""Time on a GPU without what Python takes to ask for it: the durations of the kernels alone."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from slope_mm.benchmark.interleave import Spread

# Bytes of the copy that says what the memory gives: many times any cache.
COPIED = 2**30


def kernel_times(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    calls: int = 8,
    named: tuple[str, ...] = ('',),
) -> dict[str, Spread]:
    """Seconds a call in which kernels, copies and fills keep the GPU busy, by its profiler.

    Copies from and to the host are left out: they take what the bus has left.

    Args:
        arms: Name to what is measured.
        rounds: Measurements of each arm; the arms take turns.
        calls: Calls of a measurement, which is their mean.
        named: How the names of the kernels begin that count; all by default.
    """
    spans: list[tuple[str, int, int]] = []
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        # The first round is not counted: it compiles and allocates.
        for _ in range(1 + rounds):
            for name, run in arms.items():
                torch.cuda.synchronize()
                start = time.time_ns()
                for _ in range(calls):
                    run()
                torch.cuda.synchronize()
                spans.append((name, start, time.time_ns()))
    events = sorted(
        (start_ns(event), _duration_ns(event))
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
        and event.name().startswith(named)
        and not _crosses_the_bus(event.name())
    )
    starts = [start for start, _ in events]
    found: dict[str, list[float]] = {name: [] for name in arms}
    for name, start, end in spans[len(arms) :]:
        own = events[bisect.bisect_left(starts, start) : bisect.bisect_right(starts, end)]
        found[name].append(1e-9 * sum(duration for _, duration in own) / calls)
    return {name: Spread.of(values) for name, values in found.items()}


def start_ns(event: Any) -> int:
    """When an event of a profiler began; torch 2.1's tell microseconds."""
    return int(event.start_ns() if hasattr(event, 'start_ns') else 1000 * event.start_us())


def _duration_ns(event: Any) -> int:
    return int(event.duration_ns() if hasattr(event, 'duration_ns') else 1000 * event.duration_us())


def _crosses_the_bus(name: str) -> bool:
    return name.startswith(('Memcpy HtoD', 'Memcpy DtoH'))


def memory_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of one large copy within the GPU's memory."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / kernel_times({'copy': lambda: target.copy_(source)}, 3)['copy'].median
