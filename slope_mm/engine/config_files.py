"""Configs that tools write: checked before the work, and written as a whole after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config

from slope_mm.engine.launch import read_config
from slope_mm.errors import ConfigError


def check_out(out: Path, path: str, force: bool) -> None:
    """Refuses what cannot be the config to write.

    Args:
        out: The config to write.
        path: The config that it inherits from.
        force: Whether it may replace another one.

    Raises:
        ConfigError: If it is there already, is the config to read, or is no Python file.
    """
    if out.suffix != '.py':
        raise ConfigError(f"'{out}' does not end in .py, as configs do; choose another name")
    if out.exists() and Path(path).exists() and out.samefile(path):
        raise ConfigError(f"'{out}' is the config that it would inherit from; choose another name")
    if out.exists() and not force:
        raise ConfigError(f"'{out}' is there already; choose another name or add --force")


def write_config(out: Path, text: str, check: Callable[[Config], None] | None = None) -> None:
    """Writes a config once it can be read.

    Args:
        out: Where to.
        text: Its text.
        check: Looks at what was read back, and raises if that is not what was meant.

    Raises:
        ConfigError: If it cannot be read or written; what was there before is as it was.
    """
    draft = out.with_name(f'{out.stem}_draft_{os.getpid()}.py')
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        try:
            # Read back: what was written has to inherit.
            config = read_config(str(draft))
            if check is not None:
                check(config)
            draft.replace(out)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"'{out}' cannot be written ({error.strerror}); choose another place"
        ) from None
