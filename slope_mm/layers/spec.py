"""What one layer is told to do: the outcome of a recipe for that layer."""

from __future__ import annotations

from dataclasses import dataclass

from slope_mm.ops import Codes, Pattern, weight_codes


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is compressed.

    Attributes:
        pattern: Sparsity pattern; None for dense.
        bits: Weight bits, 2..8; None for full precision.
        codes: Name of the weight code set.
        step: ``'channel'`` (one step per output channel) or ``'tensor'``.
        activation_bits: Bits of the layer's input, 2..8; None for full precision.
        gradient: ``'ste'``, ``'sr_ste'`` or ``'masked'``.
        order: ``'s_then_q'`` or ``'q_then_s'``.
        note: Why the layer gets less than the recipe asks for, or ``''``.
    """

    pattern: Pattern | None = None
    bits: int | None = None
    codes: str = 'lsq'
    step: str = 'channel'
    activation_bits: int | None = None
    gradient: str = 'ste'
    order: str = 's_then_q'
    note: str = ''

    @property
    def weight_codes(self) -> Codes | None:
        """The weight's code set, or None at full precision."""
        return None if self.bits is None else weight_codes(self.codes, self.bits)

    @property
    def compresses(self) -> bool:
        """Whether anything at all happens to the layer."""
        return any((self.pattern, self.bits, self.activation_bits))

    @property
    def signature(self) -> str:
        """What a checkpoint of this layer depends on, in one line of ASCII."""
        text = f'{self} {self.codes} {self.step}' if self.bits else str(self)
        # The order matters where there are two things to order.
        ordered = self.bits is not None and self.pattern is not None
        return f'{text} {self.order}' if ordered and self.order != 's_then_q' else text

    def __str__(self) -> str:
        parts = [self.pattern.name if self.pattern else 'dense']
        parts.append('W32' if self.bits is None else f'W{self.bits}')
        parts.append('A32' if self.activation_bits is None else f'A{self.activation_bits}')
        return ' '.join(parts)
