"""Is someone looking at the code instead of running it?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def is_compiling() -> bool:
    """Whether torch.compile or torch.export traces the caller.

    torch 2.1 and 2.2 have no public name for the question; there the answer is no, and code that
    looks at values breaks the graph.
    """
    question = getattr(torch.compiler, 'is_compiling', None)
    return question is not None and bool(question())


def left_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, into which torch.compile does not look.

    ``torch.compiler.disable`` alone asks the compiler at every call, also where nothing is
    compiled: as much as a small layer takes.
    """
    aside = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return aside(*args, **kwargs) if is_compiling() else function(*args, **kwargs)

    return call


@contextmanager
def untraced() -> Iterator[None]:
    """Scope into which torch.jit.trace does not look: what it makes is a constant of the graph.

    Its tracer loses track of passes that write into buffers block by block. (Its own way to leave a
    function out, a script, would have to compile them.)
    """
    state = torch._C._get_tracing_state() if torch.jit.is_tracing() else None
    if state is None:
        yield
        return
    resume = torch._C._set_tracing_state  # type: ignore[attr-defined]
    resume(None)
    try:
        yield
    finally:
        resume(state)
