"""Peak memory of a training step: bytes of tensors, not what an allocator holds on to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from slope_mm.benchmark.kernels import start_ns


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most bytes of tensors that one call on a device holds at once, above what it began with.

    On a GPU the allocator counts; on a CPU the profiler's allocation events are added up, which
    no other process and no page cache can disturb.
    """
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    results = recorded.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == '[memory]']
    # Those of one time stay in their order.
    changes.sort(key=start_ns)
    held = peak = 0
    for event in changes:
        held += event.nbytes()
        peak = max(peak, held)
    return peak
