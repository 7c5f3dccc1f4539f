"""``python -m slope_mm.ops.kernel_build FOLDER/NAME.pt2``: compiles one kernel.

A program of its own, which :mod:`slope_mm.ops.kernel_store` runs: the compiler takes seconds to
import and hundreds of megabytes, and must not see the modes of a training step.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

import torch
import torch._inductor

from slope_mm.ops.kernel_code import EXAMPLES


def build(file: Path) -> None:
    """Compiles the kernel that a file is named after, and puts it there as a whole.

    Args:
        file: ``NAME.pt2`` with a name of :data:`~slope_mm.ops.kernel_code.EXAMPLES`, followed by
            the sizes that its function takes: ``NAME-2-16.pt2``.
    """
    name, *sizes = file.stem.split('-')
    example = EXAMPLES[name](*map(int, sizes))
    with torch.no_grad():
        program = torch.export.export(
            example.module, example.inputs, dynamic_shapes=example.dynamic, strict=False
        )
    # AOTInductor wants a name that ends like this.
    partial = file.with_name(f'.{file.stem}.{secrets.token_hex(4)}.part.pt2')
    try:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(partial),
            inductor_configs={
                # As many threads as torch has when a kernel runs, not as it has here.
                'cpp.dynamic_threads': True,
                # Whatever is used twice stays in registers; inductor would store it and read it
                # back once it took this many operations to find.
                'realize_opcount_threshold': 1_000_000,
                'realize_reads_threshold': 1_000_000,
                **example.options,
            },
        )
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == '__main__':
    build(Path(sys.argv[1]))
