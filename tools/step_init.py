"""How good is the first quantization step? LSQ's formula against the search, as a table."""

from __future__ import annotations

import torch

from slope_mm import ops


def main() -> None:
    print('| pattern | bits | codes | LSQ formula (dB) | search (dB) |')
    print('|---|---|---|---|---|')
    for sparsity in (None, '2:4', '2:8', '2:16'):
        torch.manual_seed(0)
        w = torch.randn(256, 256, 3, 3)
        mask = None if sparsity is None else ops.parse_pattern(sparsity).mask(w, 1)
        kept = w if mask is None else w * mask
        for bits in (2, 4, 8):
            for name in ('lsq', 'odd'):
                codes = ops.weight_codes(name, bits)
                found = [
                    float(ops.sqnr_db(kept, ops.compress_weight(w, step, mask, codes)))
                    for step in (
                        ops.lsq_init_step(w, codes, 0, mask),
                        ops.mse_init_step(w, codes, 0, mask),
                    )
                ]
                print(
                    f'| {sparsity or "dense"} | {bits} | {name} | {found[0]:.2f} | {found[1]:.2f} |'
                )


if __name__ == '__main__':
    main()
