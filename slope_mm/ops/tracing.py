"""Is someone looking at the code instead of running it?"""

from __future__ import annotations

import torch


def is_compiling() -> bool:
    """Whether torch.compile or torch.export traces the caller.

    torch 2.1 and 2.2 have no public name for the question; there the answer is no, and code that
    looks at values breaks the graph.
    """
    question = getattr(torch.compiler, 'is_compiling', None)
    return question is not None and bool(question())
