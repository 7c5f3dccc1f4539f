"""Proof that mmcv's compiled operators work and belong to the installed torch.

Operators that were built for another torch fail to load, compute nonsense or crash. So this file
is a program of its own, run in a process of its own, and it knows torch and mmcv alone: the set-up
runs it before slope_mm is installed. It ends with status 0 and one line that says what was proved,
or with another status and the reason on stderr.
"""

import sys

import torch


def wrong_operators(device: str) -> list[str]:
    """Run NMS and RoIAlign on inputs whose answers are known.

    Args:
        device: The torch device to compute on.

    Returns:
        The names of the operators whose answers are wrong.

    Raises:
        ImportError: The operators are missing or do not load.
        RuntimeError: An operator does not run on this device.
    """
    from mmcv.ops import nms, roi_align

    wrong = []

    # The first two boxes overlap with an IoU of 81/119, the third lies apart.
    boxes = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 11.0, 11.0], [20.0, 20.0, 30.0, 30.0]], device=device
    )
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    _, kept = nms(boxes, scores, iou_threshold=0.5)
    if kept.tolist() != [0, 2]:
        wrong.append('nms')

    # On the plane f(y, x) = 10y + x each bin's average is the value at the bin's centre. Aligned
    # coordinates are shifted by half a pixel, so the centres are at 1.5 and 3.5.
    axis = torch.arange(8.0, device=device)
    plane = (10 * axis[:, None] + axis[None, :]).reshape(1, 1, 8, 8)
    region = torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]], device=device)
    pooled = roi_align(plane, region, (2, 2), 1.0, 2, 'avg', True)
    expected = torch.tensor([[[[16.5, 18.5], [36.5, 38.5]]]], device=device)
    if pooled.shape != expected.shape or not torch.allclose(pooled, expected):
        wrong.append('roi_align')
    return wrong


def main() -> int:
    """Prove the operators on the CPU and, where there is one, on the GPU."""
    wrong = wrong_operators('cpu')
    if wrong:
        print(f'wrong answers on the CPU: {", ".join(wrong)}', file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print('nms and roi_align are right on the CPU')
        return 0
    try:
        wrong = wrong_operators('cuda')
    except RuntimeError as error:
        # Not a failure: the CPU's work can be done. mmcv was built without nvcc.
        reason = str(error).strip().splitlines()[0]
        print(f'nms and roi_align are right on the CPU and DO NOT RUN ON THE GPU ({reason})')
        return 0
    if wrong:
        print(f'wrong answers on the GPU: {", ".join(wrong)}', file=sys.stderr)
        return 1
    print('nms and roi_align are right on CPU and GPU')
    return 0


if __name__ == '__main__':
    sys.exit(main())
