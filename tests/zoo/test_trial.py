"""How outputs of two twins are compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slope_mm.zoo.trial import _sample, difference

NAN = float('nan')


def seen(*values: float) -> list[tuple[str, Tensor]]:
    return [('layer', torch.tensor(values))]


@pytest.mark.parametrize(
    ('ours', 'theirs', 'said'),
    [
        (seen(1.0, 2.0), seen(1.0, 2.0), 'equal'),
        (seen(1.0, 2.0), seen(1.0, 2.5), "2.5e-01 at 'layer'"),
        (seen(NAN, 1.0), seen(NAN, 1.0), 'not finite in 1 of 1 outputs'),
        (seen(1.0, NAN), seen(1.0, 0.0), 'not finite in 1 of 1 outputs'),
        ([], [], 'nothing compared'),
        (seen(), seen(), 'nothing compared'),
        (seen(1.0), [('another', torch.ones(1))], 'nothing compared'),
    ],
)
def test_only_numbers_that_are_equal_are_equal(
    ours: list[tuple[str, Tensor]], theirs: list[tuple[str, Tensor]], said: str
) -> None:
    assert difference(ours, theirs) == said


@pytest.mark.parametrize('shape', [(1, 64, 32, 32), (2, 48, 20, 20), (3,), (1,), (0, 4)])
def test_samples_come_from_every_column(shape: tuple[int, ...]) -> None:
    columns = torch.arange(shape[-1]).expand(shape)
    found = _sample(columns).unique()
    assert len(found) == (shape[-1] if columns.numel() else 0)
