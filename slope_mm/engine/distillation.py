"""A teacher that runs beside a model, module by module, and the losses between both.

The teacher's modules are called from forward hooks on the modules of the same names, with the same
arguments, except that a tensor that a mirrored module of the student made is replaced by what the
teacher's module made in its place. A head that works on proposals thus gets the student's proposals
and the teacher's features, so that both outputs speak of the same regions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slope_mm.errors import ConfigError, nearest

FEATURES, LOGITS = 'loss_distill_features', 'loss_distill_logits'


@dataclass(frozen=True)
class DistillationLoss:
    """What is compared and how much it counts.

    Attributes:
        features: Names of modules whose output tensors are compared.
        logits: Names of modules whose first output holds class logits, ``[N, C, H, W]`` (dense
            heads, a list a level) or ``[N, C]``.
        feature_weight: Factor of the feature loss.
        logit_weight: Factor of the logit loss.
        temperature: Of the logit loss.
    """

    features: tuple[str, ...]
    logits: tuple[str, ...]
    feature_weight: float = 1.0
    logit_weight: float = 1.0
    temperature: float = 2.0


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over tensors of ``|s - t|^2 / |t|^2``.

    Hints as in FitNets (arXiv 1412.6550); relative, so that every level counts alike.

    Args:
        student: Tensors of any shapes.
        teacher: The same shapes.

    Returns:
        fp32 scalar.
    """
    terms = []
    for s, t in zip(student, teacher, strict=True):
        power = t.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        terms.append((s.float() - t.float()).square().sum() / power)
    return torch.stack(terms).mean()


def logit_loss(student: Tensor, teacher: Tensor, temperature: float, sigmoid: bool) -> Tensor:
    """Divergence of softened predictions, ``T^2 * KL(teacher | student)`` (arXiv 1503.02531).

    Args:
        student: Logits with classes on axis 1.
        teacher: The same shape.
        temperature: T.
        sigmoid: Whether every logit is a decision of its own instead of one of a softmax.

    Returns:
        fp32 scalar: the mean over decisions.
    """
    s, t = student.float() / temperature, teacher.float() / temperature
    if sigmoid:
        p = t.sigmoid()
        # The teacher's own entropy makes it zero at equality.
        each = F.binary_cross_entropy_with_logits(s, p, reduction='none')
        each = each - F.binary_cross_entropy_with_logits(t, p, reduction='none')
    else:
        log_p = t.log_softmax(1)
        each = (log_p.exp() * (log_p - s.log_softmax(1))).sum(1)
    return temperature**2 * each.mean()


class Distillation:
    """Hooks that run a teacher beside a student and add losses to what the student returns.

    Args:
        student: An mmengine model; its class and its modules stay as they are.
        teacher: A model with modules of the same names.
        mirrored: Names of modules that the teacher runs as well, from the image on: everything on
            the way to what is compared. The name of an ``nn.ModuleList`` (the heads of a cascade)
            stands for its modules, here and in ``loss``.
        loss: What is compared; its modules have to be among ``mirrored``.

    Raises:
        ConfigError: If a name belongs to no module, or a compared module is not mirrored.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        mirrored: Sequence[str],
        loss: DistillationLoss,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        known, own = dict(student.named_modules()), dict(teacher.named_modules())
        _refuse_unknown(mirrored, known, 'model')
        for name in (*loss.features, *loss.logits):
            if name not in mirrored:
                raise ConfigError(
                    f'distillation compares {name!r}, which is not among the mirrored modules'
                    f' {list(mirrored)}; add it there, with what comes before it'
                )
        mirrored = _members(mirrored, known)
        _refuse_unknown(mirrored, own, 'teacher')
        self.loss = loss = replace(
            loss, features=_members(loss.features, known), logits=_members(loss.logits, known)
        )
        # The student's tensors stay alive for the step, so an id stands for one of them.
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self._outputs: dict[str, tuple[Any, Any]] = {}
        self._handles = [
            student.register_forward_pre_hook(self._begin, with_kwargs=True),
            student.register_forward_hook(self._finish, with_kwargs=True),
            *(
                known[name].register_forward_hook(self._mirror(name, own[name]), with_kwargs=True)
                for name in mirrored
            ),
        ]
        self._active = False
        self._heads = {name: own[name] for name in loss.logits}

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode = kwargs.get('mode', args[2] if len(args) > 2 else 'tensor')
        self._active = mode == 'loss' and torch.is_grad_enabled()
        self._twins, self._outputs = {}, {}

    def _mirror(self, name: str, module: nn.Module) -> Callable[..., None]:
        def run(
            student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if not self._active:
                return
            with torch.no_grad():
                mirrored = module(*self._translated(args, name), **self._translated(kwargs, name))
            self._outputs[name] = output, mirrored
            for s, t in zip(tensors_of(output), tensors_of(mirrored), strict=True):
                self._twins[id(s)] = s, t

        return run

    def _translated(self, value: Any, name: str) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._translated(one, name) for one in value)
        if isinstance(value, dict):
            return {key: self._translated(one, name) for key, one in value.items()}
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._twins:
            return self._twins[id(value)][1]
        if value.requires_grad:
            raise ConfigError(
                f'distillation: {name!r} gets a tensor that none of the mirrored modules made; name'
                ' the module that makes it as well, before this one'
            )
        return value

    def _finish(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self._active:
            return output
        self._active = False
        with torch.autocast(_device_of(model).type, enabled=False):
            losses = self._losses()
        self._twins, self._outputs = {}, {}
        return {**output, **losses}

    def _losses(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.loss.features:
            for name in self.loss.features:
                if name not in self._outputs:
                    raise ConfigError(
                        f'distillation compares the features of {name!r}, whose forward nobody'
                        ' called; name a module that the model calls'
                    )
            pairs = [self._outputs[name] for name in self.loss.features]
            both = [(list(tensors_of(s)), list(tensors_of(t))) for s, t in pairs]
            terms = [feature_loss(s, t) for s, t in both]
            found[FEATURES] = self.loss.feature_weight * torch.stack(terms).mean()
        terms = []
        for name in self.loss.logits:
            # A head without a region to look at did not run.
            if name not in self._outputs:
                continue
            head, outputs = self._heads[name], self._outputs[name]
            student, teacher = (
                [by_class(logits, head) for logits in _first_tensors(side)] for side in outputs
            )
            levels = [
                logit_loss(s, t, self.loss.temperature, uses_sigmoid(head))
                for s, t in zip(student, teacher, strict=True)
                if s.numel()
            ]
            terms += [torch.stack(levels).mean()] if levels else []
        if terms:
            found[LOGITS] = self.loss.logit_weight * torch.stack(terms).mean()
        return found


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_of(one)


def _first_tensors(output: Any) -> list[Tensor]:
    """Class logits of a head's output: its first element, or what is in it."""
    first = output[0] if isinstance(output, (list, tuple)) else output
    return list(tensors_of(first))


def _refuse_unknown(names: Sequence[str], modules: Mapping[str, nn.Module], whose: str) -> None:
    for name in names:
        if name not in modules:
            raise ConfigError(
                f'distillation: the {whose} has no module {name!r}{nearest(name, modules)}'
            )


def _members(names: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Names with those of a list's modules in place of the list's: nobody calls a list."""
    found: list[str] = []
    for name in names:
        module = modules[name]
        if isinstance(module, nn.ModuleList):
            found += _members([f'{name}.{index}' for index in range(len(module))], modules)
        else:
            found.append(name)
    return tuple(found)


def by_class(logits: Tensor, head: nn.Module) -> Tensor:
    """A head's class logits with the classes of one decision on axis 1.

    Args:
        logits: ``[N, C]``, or ``[N, A * C, H, W]`` with A anchors a place.
        head: The head that gave them.

    Returns:
        ``[N, C]`` or ``[N, C, A, H, W]``; unchanged where the head does not say its C.
    """
    classes = getattr(head, 'cls_out_channels', None)
    if logits.dim() != 4 or not classes or logits.shape[1] % int(classes):
        return logits
    return logits.unflatten(1, (-1, int(classes))).transpose(1, 2)


def uses_sigmoid(head: nn.Module) -> bool:
    """Whether a head's loss takes logits as decisions of their own, a mask head's pixels too."""
    kind = getattr(head, 'use_sigmoid_cls', None)
    if kind is None:
        losses = (getattr(head, name, None) for name in ('loss_mask', 'loss_point'))
        kind = (
            any(getattr(x, 'use_mask', 0) or getattr(x, 'use_sigmoid', 0) for x in losses) or None
        )
    if kind is None:
        kind = getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', False)
    return bool(kind)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
