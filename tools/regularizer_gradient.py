"""Does descending on the regularizer raise the cosine? A table of gradients, patterns and bits."""

from __future__ import annotations

import torch

from slope_mm import convert, regularization
from slope_mm.ops import cosine

SETTINGS = (('2:4', 4), ('2:4', 2), ('2:8', 4), (None, 4), (None, 2))
LOOKS = (0, 10, 50, 200)


def cosines(sparsity: str | None, bits: int, gradient: str, optimizer: str) -> list[float]:
    """Cosine at each of ``LOOKS`` while a convolution descends on the regularizer alone."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, bias=False))
    torch.nn.init.normal_(model[0].weight, std=0.05)
    convert(model, {'weight': {'sparsity': sparsity, 'bits': bits}})
    layer = model[0]
    if optimizer == 'SGD':
        descent: torch.optim.Optimizer = torch.optim.SGD([layer.weight], lr=2.0)
    else:
        descent = torch.optim.AdamW([layer.weight], lr=5e-4, weight_decay=0)
    seen = []
    for iteration in range(LOOKS[-1] + 1):
        if iteration in LOOKS:
            seen.append(float(cosine(layer.weight, layer.compressed_weight())))
        descent.zero_grad()
        regularization(model, gradient=gradient).backward()
        descent.step()
    return seen


def main() -> None:
    print(
        '| pattern | bits | optimizer | gradient | ' + ' | '.join(f'at {n}' for n in LOOKS) + ' |'
    )
    print('|---' * (4 + len(LOOKS)) + '|')
    for sparsity, bits in SETTINGS:
        for optimizer in ('SGD', 'AdamW'):
            for gradient in ('ste', 'exact'):
                row = cosines(sparsity, bits, gradient, optimizer)
                figures = ' | '.join(f'{value:.4f}' for value in row)
                print(f'| {sparsity or "dense"} | {bits} | {optimizer} | {gradient} | {figures} |')


if __name__ == '__main__':
    main()
