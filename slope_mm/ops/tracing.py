"""Is someone looking at the code instead of running it?"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
