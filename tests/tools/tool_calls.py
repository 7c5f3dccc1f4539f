"""Calls of the tools as the tests make them, and what a refusal looks like."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import tiny


def call(tool: str, *arguments: Any) -> tuple[int, str]:
    """Exit code and standard error of a tool that runs in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = tiny.call_tool(tool, *arguments)
    return code, errors.getvalue()


def contents(folder: Path) -> dict[str, bytes] | None:
    """Every file below a folder; None if it does not exist."""
    if not folder.exists():
        return None
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_refused(code: int, errors: str, parts: list[str]) -> None:
    assert code == 2
    assert errors.startswith('error: ')
    assert errors.count('\n') == 1, errors
    assert errors.endswith('\n')
    for part in parts:
        assert part in errors
