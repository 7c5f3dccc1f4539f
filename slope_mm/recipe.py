"""What to compress and how: a validated recipe of ordered rules, resolved to one spec per layer.

    recipe = dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4),
                  rules=[dict(match='backbone.layer1', weight=dict(bits=8))])

The last rule that matches a layer wins; keys that it leaves out fall back to the recipe's own.
The built-in rules of :func:`default_rules` come before the user's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slope_mm.errors import RecipeError, nearest
from slope_mm.layers import LayerSpec
from slope_mm.ops import (
    GRADIENTS,
    NMPattern,
    Pattern,
    check_bits,
    parse_pattern,
    weight_codes,
)

STEPS = ('channel', 'tensor')
ORDERS = ('s_then_q', 'q_then_s')
WEIGHT_KEYS = ('sparsity', 'bits', 'codes', 'step')
ACTIVATION_KEYS = ('bits',)
RECIPE_KEYS = ('weight', 'activation', 'gradient', 'order', 'rules')
RULE_KEYS = ('match', 'weight', 'activation', 'gradient', 'order', 'compress')

# Bits of what the default rules keep dense: the first and the last layers of a detector.
EDGE_BITS = 8
# Names of stems where more than the first layer belongs to it.
STEM = r'(.*\.)?stem(\..*)?'
# The layers whose output is a prediction, by the last part of their name (an index may follow):
# rpn_cls, rpn_reg, fc_cls, fc_reg, conv_logits in two-stage detectors; retina_cls, atss_reg,
# gfl_cls, rtm_obj, conv_centerness, multi_level_conv_cls.0, convs_pred.0, cls_branches.5, ... in
# others. Towers such as cls_convs.0.conv end otherwise and follow the recipe.
PREDICTION = (
    r'(.*\.)?((\w+_)?(cls|reg|obj|iou|centerness|logits|pred|score|seg|kernel|coeff|cls_out|pts_out'
    r'|refine_out|init_out|class_embed|cls_embed|cls_branches|reg_refine|loc|shape|mask_list)(\.\d+)*'
    # Where the prediction is the last of a few layers: CenterNet, the DETR family, SOLOv2.
    r'|(heatmap|wh|offset)_head\.2|reg_branches\.\d+\.4|conv_pred\.conv)'
)
# Sampling offsets of deformable convolutions: a small error there moves every sample.
OFFSETS = r'(.*\.)?(conv_offset|offset_[sl])'
# Those of deformable attention, relative to reference points and many to a query, are less fragile.
ATTENTION_OFFSETS = r'(.*\.)?sampling_offsets'


@dataclass(frozen=True)
class WeightRecipe:
    """The weight part: pattern, bits, code set and step granularity."""

    sparsity: Pattern | None = None
    bits: int | None = None
    codes: str = 'lsq'
    step: str = 'channel'


@dataclass(frozen=True)
class Rule:
    """One rule: which layers, and what is different for them.

    Attributes:
        match: A name or a name's prefix; ``re:PATTERN`` (whole name); ``type:CLASS``; or ``in:N``
            (layers with N input channels).
        weight: Overridden keys of the weight part; None in a recipe means dense at full precision.
        activation: Overriding activation bits, under the key ``bits``; empty if not overridden.
        gradient: Overriding gradient, or None.
        order: Overriding order, or None.
        compress: False leaves the layer alone.
        reason: What a default rule says in the report.
    """

    match: str
    weight: Mapping[str, Any] = field(default_factory=dict)
    activation: Mapping[str, int | None] = field(default_factory=dict)
    gradient: str | None = None
    order: str | None = None
    compress: bool = True
    reason: str = ''

    def matches(self, names: Iterable[str], types: Iterable[str], channels: int | None) -> bool:
        """Whether the rule speaks of a layer with these (alias) names and class names."""
        if self.match.startswith('re:'):
            return any(re.fullmatch(self.match[3:], name) for name in names)
        if self.match.startswith('type:'):
            return self.match[5:] in types
        if self.match.startswith('in:'):
            return channels is not None and self.match[3:] == str(channels)
        return any(name == self.match or name.startswith(self.match + '.') for name in names)


@dataclass(frozen=True)
class Recipe:
    """A validated recipe; :meth:`parse` makes one from a config's dict."""

    weight: WeightRecipe
    activation_bits: int | None = None
    gradient: str = 'ste'
    order: str = 's_then_q'
    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, recipe: Mapping[str, Any] | Recipe) -> Recipe:
        """Validates a recipe.

        Args:
            recipe: The dict of a config (see the module's docstring), or a Recipe.

        Raises:
            RecipeError: Names the offending key or value, where it stands, and what is allowed.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if not isinstance(recipe, Mapping):
            raise RecipeError(
                f'the recipe is a {type(recipe).__name__}, not a dict; write'
                " recipe=dict(weight=dict(sparsity='2:4', bits=4))"
            )
        given = _known(recipe, RECIPE_KEYS, 'the recipe')
        if given.get('weight') is None:
            raise RecipeError(
                "the recipe has no 'weight' part; write weight=dict(sparsity='2:4', bits=4)"
            )
        weight = WeightRecipe(**_weight(given['weight'], "the recipe's weight"))
        rules = given.get('rules') or ()
        if not isinstance(rules, Sequence) or isinstance(rules, str):
            raise RecipeError(
                "the recipe's rules are not a list of dicts; write them in a config that inherits"
                ' from this one, as --cfg-options takes no dicts'
            )
        parsed = cls(
            weight,
            _activation(given.get('activation'), 'the recipe')['bits'],
            _choice(given.get('gradient', 'ste'), tuple(GRADIENTS), "the recipe's gradient"),
            _choice(given.get('order', 's_then_q'), ORDERS, "the recipe's order"),
            tuple(_rule(rule, index) for index, rule in enumerate(rules)),
        )
        for rule in (Rule(''), *parsed.rules):
            _check_soft(parsed.spec(rule), rule)
        asked = [weight.sparsity, weight.bits, parsed.activation_bits]
        for rule in parsed.rules:
            asked += [rule.weight.get(key) for key in ('sparsity', 'bits')]
            asked += rule.activation.values()
        if not any(asked):
            raise RecipeError(
                'the recipe compresses nothing: give weight sparsity, weight bits or activation'
                ' bits, to all layers or in a rule'
            )
        return parsed

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain dicts, lists, strings and numbers; ``parse`` reads it back."""
        weight = {**vars(self.weight), 'sparsity': _name(self.weight.sparsity)}
        rules = []
        for rule in self.rules:
            row: dict[str, Any] = {'match': rule.match}
            if not rule.compress:
                row['compress'] = False
            if rule.weight:
                row['weight'] = {
                    k: _name(v) if k == 'sparsity' else v for k, v in rule.weight.items()
                }
            if rule.activation:
                row['activation'] = None if rule.activation['bits'] is None else rule.activation
            row.update({k: v for k in ('gradient', 'order') if (v := getattr(rule, k))})
            rules.append(row)
        return {
            'weight': weight,
            'activation': None if self.activation_bits is None else {'bits': self.activation_bits},
            'gradient': self.gradient,
            'order': self.order,
            'rules': rules,
        }

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """The default rules, the user's, and between them what keeps a teacher dense.

        The teacher of mmdet's semi-supervised detectors has the student's layers under names of its
        own. It is left alone but for rules that name it, which come last.
        """
        named = [rule for rule in self.rules if _names_teacher(rule.match)]
        general = [rule for rule in self.rules if rule not in named]
        teacher = Rule('teacher', compress=False, reason='teacher')
        return (*default_rules(self), *general, teacher, *named)

    def spec(self, rule: Rule | None) -> LayerSpec | None:
        """What a layer gets whose last matching rule is ``rule``; None if it is left alone."""
        if rule is None:
            rule = Rule('')
        if not rule.compress:
            return None
        weight = {**vars(self.weight), **rule.weight}
        return LayerSpec(
            weight['sparsity'],
            weight['bits'],
            weight['codes'],
            weight['step'],
            rule.activation['bits'] if rule.activation else self.activation_bits,
            rule.gradient or self.gradient,
            rule.order or self.order,
            rule.reason,
        )


def _check_soft(spec: LayerSpec | None, rule: Rule) -> None:
    """The soft gradient looks at the groups of a mask that is found while W is compressed."""
    if spec is None or spec.gradient != 'soft' or spec.pattern is None:
        return
    if not isinstance(spec.pattern, NMPattern) or spec.order != 's_then_q':
        where = f'the rule match={rule.match!r}' if rule.match else 'the recipe'
        raise RecipeError(
            f"{where} combines gradient='soft' with {spec.pattern.name}, {spec.order}; it needs an"
            " N:M pattern and order='s_then_q'"
        )


def default_rules(recipe: Recipe) -> tuple[Rule, ...]:
    """The project's own choice of what is kept gentler, in one place.

    The stem (whatever reads the image, and every layer of a module called ``stem``) and the
    prediction layers stay dense with 8-bit weights, and 8-bit activations where the recipe
    quantizes activations at all; a recipe without weight bits leaves them at full precision. So do
    the sampling offsets of deformable attention; those of deformable convolutions are left alone.
    They are dense, so ``odd`` levels, which leave the zero to the mask, become ``symmetric`` ones,
    closed under negation too: at 8 bits that costs nothing, and the codes stay within int8. The
    paper does not publish its policy for these layers.
    """
    bits = None if recipe.weight.bits is None else EDGE_BITS
    weight: dict[str, Any] = {'sparsity': None, 'bits': bits}
    if recipe.weight.codes == 'odd':
        weight['codes'] = 'symmetric'
    activation = {'bits': None if recipe.activation_bits is None else EDGE_BITS}

    def edge(match: str, reason: str) -> Rule:
        return Rule(match, weight, activation, reason=reason)

    return (
        edge('in:3', 'stem'),
        edge('re:' + STEM, 'stem'),
        edge('re:' + PREDICTION, 'prediction layer'),
        edge('re:' + ATTENTION_OFFSETS, 'sampling offsets'),
        Rule('re:' + OFFSETS, compress=False, reason='sampling offsets'),
    )


def _name(pattern: Pattern | None) -> str | None:
    return None if pattern is None else pattern.name


def _names_teacher(match: str) -> bool:
    """Whether a rule speaks of a teacher; a lookahead that excludes one does not."""
    return 'teacher' in re.sub(r'\(\?<?![^()]*\)', '', match)


def _known(given: Mapping[str, Any], keys: Sequence[str], where: str) -> dict[str, Any]:
    """The mapping without mmengine's ``_scope_``, if all its keys are known."""
    plain = {key: value for key, value in given.items() if key != '_scope_'}
    for key in plain:
        if key not in keys:
            raise RecipeError(
                f'{where} has the unknown key {key!r}{nearest(str(key), keys)}; allowed:'
                f' {", ".join(keys)}'
            )
    return plain


def _choice(value: Any, allowed: Sequence[str], what: str) -> str:
    if value not in allowed:
        raise RecipeError(
            f'{what} is {value!r}; choose one of {list(allowed)}{nearest(str(value), allowed)}'
        )
    return str(value)


def _weight(given: Any, where: str) -> dict[str, Any]:
    """Validated keys of a weight part; only those that were given."""
    if not isinstance(given, Mapping):
        raise RecipeError(
            f"{where} is {given!r}; write a dict such as dict(sparsity='2:4', bits=4)"
        )
    weight = _known(given, WEIGHT_KEYS, where)
    try:
        if weight.get('sparsity') is not None:
            weight['sparsity'] = parse_pattern(weight['sparsity'])
        if weight.get('bits') is not None:
            check_bits(weight['bits'], 'weight')
        if 'codes' in weight:
            weight_codes(weight['codes'], 8)
    except RecipeError as error:
        raise RecipeError(f'{where}: {error}') from None
    if 'step' in weight:
        _choice(weight['step'], STEPS, f'{where} step')
    return weight


def _rule_weight(rule: Mapping[str, Any], where: str) -> dict[str, Any]:
    if 'weight' not in rule:
        return {}
    if rule['weight'] is None:
        return {'sparsity': None, 'bits': None}
    return _weight(rule['weight'], where)


def _activation(given: Any, where: str) -> dict[str, int | None]:
    if given is None:
        return {'bits': None}
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}'s activation is {given!r}; write dict(bits=4), or None")
    bits = _known(given, ACTIVATION_KEYS, f"{where}'s activation").get('bits')
    return {'bits': None if bits is None else check_bits(bits, f"{where}'s activation")}


def _rule(given: Any, index: int) -> Rule:
    where = f'rule {index} of the recipe'
    if not isinstance(given, Mapping):
        # What --cfg-options makes of a dict.
        elsewhere = ' in a config file, as --cfg-options takes no dicts'
        raise RecipeError(
            f"{where} is {given!r}; write dict(match='...', ...)"
            f'{elsewhere if isinstance(given, str) else ""}'
        )
    rule = _known(given, RULE_KEYS, where)
    match = rule.get('match')
    if not isinstance(match, str) or not match:
        raise RecipeError(
            f"{where} has no 'match'; give a layer's name or prefix, 're:...', 'type:...' or"
            " 'in:...'"
        )
    where = f'{where} (match={match!r})'
    if match.startswith('re:'):
        try:
            re.compile(match[3:])
        except re.error as error:
            raise RecipeError(f'{where} is not a regular expression: {error}') from None
    compress = rule.get('compress', True)
    if not isinstance(compress, bool):
        raise RecipeError(f'{where} has compress={compress!r}; write True or False')
    return Rule(
        match,
        _rule_weight(rule, f"{where}'s weight"),
        _activation(rule['activation'], where) if 'activation' in rule else {},
        _choice(rule['gradient'], tuple(GRADIENTS), f'{where}: gradient')
        if rule.get('gradient') is not None
        else None,
        _choice(rule['order'], ORDERS, f'{where}: order')
        if rule.get('order') is not None
        else None,
        compress,
    )
