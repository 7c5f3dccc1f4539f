"""``--cfg-options KEY=VALUE``: mmengine's, with a sentence where it cannot be read."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from mmengine.config import DictAction

from slope_mm.errors import ConfigError


class ConfigOptions(DictAction):
    """Takes ``KEY=VALUE`` pairs; values are numbers, words, and lists or tuples of them."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Adds the pairs to what was given before.

        Raises:
            ConfigError: If one cannot be read; names it.
        """
        for given in [values] if isinstance(values, str) else values or []:
            try:
                super().__call__(parser, namespace, [given], option_string)
            # A dict ends in mmengine's endless recursion, a missing '=' in a ValueError, and
            # brackets that do not match in an AssertionError.
            except (RecursionError, ValueError, AssertionError):
                raise ConfigError(
                    f'--cfg-options {given!r} cannot be read: write KEY=VALUE, where VALUE is a'
                    ' number, a word, or a list such as [1,2]; for dicts, as rules of a recipe are,'
                    ' write a config that inherits from this one'
                ) from None
