"""mmengine's mixed precision, also without an accelerator: bf16 on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mmcv.ops  # noqa: F401 - defines the operators that run_operators_in_fp32 looks for
import torch
from mmengine.device import (
    is_cuda_available,
    is_mlu_available,
    is_musa_available,
    is_npu_available,
)
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor

from slope_mm.errors import ConfigError


def has_accelerator() -> bool:
    """Whether mmengine's own ``AmpOptimWrapper`` can be built on this machine."""
    return any((is_cuda_available(), is_npu_available(), is_mlu_available(), is_musa_available()))


@OPTIM_WRAPPERS.register_module()
class MixedPrecisionOptimWrapper(AmpOptimWrapper):
    """``AmpOptimWrapper``, which without an accelerator trains in bf16 on the CPU.

    With an accelerator it is mmengine's. On the CPU there is no loss scaling, as bf16 has the
    range of fp32, and ``loss_scale`` is ignored. Where bf16 is used, mmcv's compiled operators,
    which do not know it, compute in fp32.

    Args:
        loss_scale (str | float | dict): As mmengine's. Defaults to ``'dynamic'``.
        dtype (str | torch.dtype, optional): As mmengine's; on the CPU ``'bfloat16'`` or None.
        use_fsdp (bool): As mmengine's. Defaults to False.
        **kwargs: Those of ``OptimWrapper``.

    Raises:
        ConfigError: For another dtype on the CPU.
    """

    def __init__(
        self,
        loss_scale: Any = 'dynamic',
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        if has_accelerator():
            super().__init__(loss_scale, dtype, use_fsdp, **kwargs)
        else:
            if dtype not in (None, 'bfloat16', torch.bfloat16):
                raise ConfigError(
                    f'optim_wrapper.dtype={dtype!r}: mixed precision on the CPU is bfloat16; leave'
                    ' dtype out'
                )
            # The initialiser between, mmengine's, asserts an accelerator.
            OptimWrapper.__init__(self, **kwargs)
            self._scale_update_param = None
            self.loss_scaler = _disabled_scaler()
            self.cast_dtype = torch.bfloat16
        if self.cast_dtype == torch.bfloat16:
            run_operators_in_fp32()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, with the loss scaler's where losses are scaled."""
        if self.loss_scaler.is_enabled():
            return super().state_dict()
        # An enabled scaler refuses the empty state of a disabled one: a run goes on on a GPU.
        return OptimWrapper.state_dict(self)


def _disabled_scaler() -> Any:
    # torch before 2.3 has the scaler of CUDA alone, which need not be there for a disabled one.
    scaler = getattr(torch.amp, 'GradScaler', None)
    return torch.cuda.amp.GradScaler(enabled=False) if scaler is None else scaler(enabled=False)


@functools.cache
def run_operators_in_fp32() -> None:
    """Makes mmcv's compiled operators compute in fp32 on bf16, for the rest of the process.

    NMS, RoIAlign and others stop at bf16 with "expected scalar type Float". An operator whose first
    tensor is bf16 gives bf16, as mmdet expects it; tensors of other types pass as they are.
    """
    for operator in torch.autograd.Function.__subclasses__():
        if not operator.__module__.startswith('mmcv.ops'):
            continue
        # Autograd itself gives an input the gradient in the input's type.
        for name, narrow in (('forward', True), ('backward', False)):
            if name in vars(operator):
                function = _in_fp32(getattr(operator, name), narrow=narrow)
                setattr(operator, name, staticmethod(function))


def _in_fp32(function: Callable[..., Any], *, narrow: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def widened(*args: Any, **kwargs: Any) -> Any:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        result = function(*map(_widened, args), **{k: _widened(v) for k, v in kwargs.items()})
        if not narrow or first is None or first.dtype != torch.bfloat16:
            return result
        return tuple(map(_narrowed, result)) if isinstance(result, tuple) else _narrowed(result)

    return widened


def _widened(value: Any) -> Any:
    is_bf16 = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_bf16 else value


def _narrowed(value: Any) -> Any:
    is_fp32 = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.bfloat16() if is_fp32 else value
