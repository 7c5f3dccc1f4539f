"""The recipe: what each form means, what is refused and how, and the built-in rules."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from torch import nn

import slope_mm
from slope_mm import Recipe, RecipeError
from slope_mm.layers import LayerSpec
from slope_mm.ops import NMPattern, UnstructuredPattern

CONFIGS = Path(__file__).parents[1] / 'configs'
WEIGHT = dict(sparsity='2:4', bits=4)
W4A4 = dict(weight=WEIGHT, activation=dict(bits=4))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3)
        self.conv2 = nn.Conv2d(channels, channels, 1)


class Net(nn.Module):
    """Names as detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv1 = nn.Conv2d(3, 8, 3)
        self.backbone.layer1 = nn.Sequential(Block(8), Block(8))
        self.backbone.layer10 = Block(16)
        self.neck = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ConvTranspose2d(16, 8, 2))
        self.head = nn.Module()
        self.head.fc = nn.Linear(32, 16)
        self.head.fc_cls = nn.Linear(16, 5)


def specs(recipe: dict[str, Any], model: nn.Module | None = None) -> dict[str, LayerSpec | None]:
    return {p.name: p.spec for p in slope_mm.plan(model or Net(), recipe)}


def spec(recipe: dict[str, Any], name: str) -> LayerSpec:
    found = specs(recipe)[name]
    assert found is not None
    return found


# --- what a recipe means -------------------------------------------------------------------------


def test_everything_but_the_weight_has_a_default() -> None:
    assert spec(dict(weight=dict(bits=4)), 'head.fc') == LayerSpec(bits=4)
    made = spec(dict(weight=dict(sparsity='2:8')), 'head.fc')
    assert made == LayerSpec(
        NMPattern(2, 8), None, 'lsq', 'channel', None, 'ste', 's_then_q', note=''
    )


def test_every_key_reaches_the_layer() -> None:
    recipe = dict(
        weight=dict(sparsity='unstructured:0.25', bits=3, codes='odd', step='tensor'),
        activation=dict(bits=6),
        gradient='sr_ste',
        order='q_then_s',
    )
    assert spec(recipe, 'neck.0') == LayerSpec(
        UnstructuredPattern(0.25), 3, 'odd', 'tensor', 6, 'sr_ste', 'q_then_s'
    )


def test_a_rule_overrides_what_it_names_and_falls_back_for_the_rest() -> None:
    rule = dict(match='head.fc', weight=dict(bits=8), gradient='masked')
    recipe = dict(weight=dict(WEIGHT, codes='symmetric'), activation=dict(bits=4), rules=[rule])
    assert spec(recipe, 'head.fc') == LayerSpec(
        NMPattern(2, 4), 8, 'symmetric', 'channel', 4, 'masked', 's_then_q'
    )
    assert spec(recipe, 'neck.0') == spec(dict(recipe, rules=[]), 'neck.0')


def test_a_rule_may_override_each_part() -> None:
    def with_rule(**rule: Any) -> LayerSpec:
        return spec(dict(W4A4, rules=[dict(match='head.fc', **rule)]), 'head.fc')

    assert with_rule() == LayerSpec(NMPattern(2, 4), 4, activation_bits=4)
    assert with_rule(weight=dict(sparsity='2:8')).pattern == NMPattern(2, 8)
    assert with_rule(weight=dict(sparsity=None)).pattern is None
    assert with_rule(weight=dict(bits=None)).bits is None
    assert with_rule(weight=dict(codes='odd')).codes == 'odd'
    assert with_rule(weight=dict(step='tensor')).step == 'tensor'
    assert with_rule(activation=dict(bits=8)).activation_bits == 8
    assert with_rule(activation=None).activation_bits is None
    assert with_rule(activation=dict(bits=None)).activation_bits is None
    assert with_rule(order='q_then_s').order == 'q_then_s'
    assert with_rule(weight=None) == LayerSpec(activation_bits=4)


def test_the_last_match_wins_as_a_whole() -> None:
    """What an earlier rule said is forgotten; the recipe's own values are the fallback."""
    rules = [
        dict(match='backbone', weight=dict(bits=8), activation=None),
        dict(match='backbone.layer1', weight=dict(sparsity=None)),
        dict(match='backbone.layer1.1.conv2', compress=False),
    ]
    found = specs(dict(W4A4, rules=rules))
    assert found['backbone.layer10.conv1'] == LayerSpec(NMPattern(2, 4), 8)
    assert found['backbone.layer1.0.conv1'] == LayerSpec(None, 4, activation_bits=4)
    assert found['backbone.layer1.1.conv2'] is None
    assert found['neck.0'] == LayerSpec(NMPattern(2, 4), 4, activation_bits=4)
    # Put first, it is overruled.
    rules = [rules[2], *rules[:2]]
    assert specs(dict(W4A4, rules=rules))['backbone.layer1.1.conv2'] is not None


def test_a_users_rule_overrules_the_built_in_ones() -> None:
    assert spec(W4A4, 'head.fc_cls').bits == 8
    recipe = dict(W4A4, rules=[dict(match='head', weight=dict(bits=5))])
    assert spec(recipe, 'head.fc_cls') == LayerSpec(NMPattern(2, 4), 5, activation_bits=4)


ALL = {
    'backbone.conv1',
    'backbone.layer1.0.conv1',
    'backbone.layer1.0.conv2',
    'backbone.layer1.1.conv1',
    'backbone.layer1.1.conv2',
    'backbone.layer10.conv1',
    'backbone.layer10.conv2',
    'neck.0',
    'neck.1',
    'head.fc',
    'head.fc_cls',
}


@pytest.mark.parametrize(
    ('match', 'expected'),
    [
        ('head.fc', {'head.fc'}),
        ('head', {'head.fc', 'head.fc_cls'}),
        ('backbone.layer1', {name for name in ALL if name.startswith('backbone.layer1.')}),
        ('backbone.layer1.1', {'backbone.layer1.1.conv1', 'backbone.layer1.1.conv2'}),
        ('re:.*conv2', {name for name in ALL if name.endswith('conv2')}),
        ('re:neck', set()),
        ('re:neck.*', {'neck.0', 'neck.1'}),
        (r're:.*\.layer\d+\.conv1', {'backbone.layer10.conv1'}),
        ('type:Linear', {'head.fc', 'head.fc_cls'}),
        ('type:ConvTranspose2d', {'neck.1'}),
        ('type:_ConvNd', {name for name in ALL if not name.startswith('head')}),
        ('in:16', {'backbone.layer10.conv1', 'backbone.layer10.conv2', 'neck.0', 'neck.1'}
         | {'head.fc_cls'}),
        ('in:3', {'backbone.conv1'}),
    ],
)  # fmt: skip
def test_what_a_rule_matches(match: str, expected: set[str]) -> None:
    recipe = dict(W4A4, rules=[dict(match=match, compress=False)])
    if not expected:
        with pytest.raises(RecipeError, match='matches no layer'):
            specs(recipe)
        return
    assert {name for name, found in specs(recipe).items() if found is None} == expected


def test_channels_are_those_of_the_layer_not_of_a_group() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(3, 8, 1)
    )
    recipe = dict(weight=dict(bits=4), rules=[dict(match='in:6', weight=dict(bits=5))])
    found = {name: made.bits for name, made in specs(recipe, model).items() if made}
    assert found == {'0': 5, '1': 4, '2': 8}
    with pytest.raises(RecipeError, match="'in:1' matches no layer"):
        specs(dict(weight=dict(bits=4), rules=[dict(match='in:1', compress=False)]), model)


def test_a_recipe_may_compress_through_its_rules_alone() -> None:
    recipe = dict(weight={}, rules=[dict(match='neck', weight=dict(sparsity='2:4', bits=4))])
    found = specs(recipe)
    assert {name for name, made in found.items() if made} == {'neck.0', 'neck.1'}


@pytest.mark.parametrize('wrap', [dict, ConfigDict, lambda d: Config(dict(recipe=d)).recipe])
def test_a_recipe_may_come_from_a_config(wrap: Callable[[dict[str, Any]], Any]) -> None:
    """mmengine's dicts, with the scopes that ``mmdet::`` bases put on every level."""
    rule = dict(match='head', weight=dict(bits=8, _scope_='mmdet'), _scope_='mmdet')
    given = dict(
        weight=dict(WEIGHT, _scope_='mmdet'),
        activation=dict(bits=4, _scope_='mmdet'),
        rules=[rule],
        _scope_='mmdet',
    )
    plain = dict(W4A4, rules=[dict(match='head', weight=dict(bits=8))])
    assert Recipe.parse(wrap(given)) == Recipe.parse(plain)


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('_base_/recipes/*.py')), ids=lambda p: p.stem)
def test_the_recipes_that_ship_are_valid(path: Path) -> None:
    config = Config.fromfile(path)
    recipe = Recipe.parse(config.recipe)
    assert slope_mm.plan(Net(), recipe)
    assert Recipe.parse(recipe.to_dict()) == recipe


# --- round trips ---------------------------------------------------------------------------------

SPARSITIES = st.none() | st.sampled_from(['2:4', '1:2', '2:8', '2:16', '4:8', '7:32']) | st.floats(
    1e-12, 1
).map(lambda share: f'unstructured:{share}')  # fmt: skip
BITS = st.none() | st.integers(2, 8)
WEIGHTS = st.fixed_dictionaries(
    {},
    optional=dict(
        sparsity=SPARSITIES,
        bits=BITS,
        codes=st.sampled_from(['lsq', 'symmetric', 'odd']),
        step=st.sampled_from(['channel', 'tensor']),
    ),
)
ACTIVATIONS = st.none() | st.fixed_dictionaries({}, optional=dict(bits=BITS))
GRADIENTS = st.sampled_from(['ste', 'sr_ste', 'masked'])
ORDERS = st.sampled_from(['s_then_q', 'q_then_s'])
MATCHES = st.sampled_from(['head', 'backbone.layer1', 're:.*conv1', 'type:Linear', 'in:16'])
RULES = st.fixed_dictionaries(
    dict(match=MATCHES),
    optional=dict(
        weight=WEIGHTS,
        activation=ACTIVATIONS,
        gradient=GRADIENTS,
        order=ORDERS,
        compress=st.booleans(),
    ),
)
RECIPES = st.fixed_dictionaries(
    dict(weight=WEIGHTS.map(lambda weight: {'bits': 4, **weight, 'sparsity': '2:4'})),
    optional=dict(
        activation=ACTIVATIONS, gradient=GRADIENTS, order=ORDERS, rules=st.lists(RULES, max_size=4)
    ),
)


@settings(deadline=None, max_examples=100)
@given(RECIPES)
def test_a_recipe_reads_back_from_its_dict(given_recipe: dict[str, Any]) -> None:
    before = copy.deepcopy(given_recipe)
    recipe = Recipe.parse(given_recipe)
    assert given_recipe == before
    written = recipe.to_dict()
    assert Recipe.parse(json.loads(json.dumps(written))) == recipe
    assert Recipe.parse(written).to_dict() == written
    assert Recipe.parse(recipe) is recipe


@settings(deadline=None, max_examples=40)
@given(RECIPES)
def test_a_recipe_and_its_dict_plan_the_same(given_recipe: dict[str, Any]) -> None:
    recipe = Recipe.parse(given_recipe)
    try:
        expected = specs(given_recipe)
    except RecipeError as error:
        with pytest.raises(RecipeError) as raised:
            specs(recipe.to_dict())
        assert str(raised.value) == str(error)
        return
    assert specs(recipe.to_dict()) == expected


# --- what is refused -----------------------------------------------------------------------------


def rules(*given_rules: Any) -> dict[str, Any]:
    return dict(W4A4, rules=list(given_rules))


# What is wrong, and the parts of the message: what, where, what to do.
REFUSED: dict[str, tuple[Any, list[str]]] = {
    'not a dict': ('w4a4', ['the recipe is a str', 'write recipe=dict(weight=']),
    'nothing at all': (None, ['the recipe is a NoneType', 'write recipe=dict(']),
    'no weight': (dict(activation=dict(bits=4)), ["no 'weight' part", 'write weight=dict(']),
    'weight is a number': (dict(weight=4), ["the recipe's weight is 4", 'write a dict']),
    'unknown key': (
        dict(W4A4, wieght=WEIGHT),
        ["the recipe has the unknown key 'wieght'", "nearest: 'weight'", 'allowed: weight,'],
    ),
    'unknown weight key': (
        dict(weight=dict(sparsitty='2:4')),
        ["the recipe's weight has the unknown key 'sparsitty'", "nearest: 'sparsity'", 'allowed:'],
    ),
    'unknown activation key': (
        dict(weight=WEIGHT, activation=dict(bit=4)),
        ["the recipe's activation has the unknown key 'bit'", "nearest: 'bits'"],
    ),
    'activation is a number': (
        dict(weight=WEIGHT, activation=4),
        ["the recipe's activation is 4", 'write dict(bits=4), or None'],
    ),
    'pattern reversed': (
        dict(weight=dict(sparsity='4:2')),
        ["the recipe's weight", "'4:2' is not a pattern", 'kept', "did you mean '2:4'"],
    ),
    'pattern too long': (dict(weight=dict(sparsity='2:64')), ["'2:64'", '1 <= N < M <= 32']),
    'pattern keeps all': (dict(weight=dict(sparsity='4:4')), ["'4:4'", '1 <= N < M']),
    'pattern keeps none': (dict(weight=dict(sparsity='0:4')), ["'0:4'", '1 <= N < M']),
    'no pattern': (dict(weight=dict(sparsity='half')), ["sparsity 'half'", "write 'N:M'"]),
    'a number as pattern': (dict(weight=dict(sparsity=0.5)), ['sparsity 0.5', "write 'N:M'"]),
    'density over 1': (
        dict(weight=dict(sparsity='unstructured:2')),
        ['unstructured:2', 'above 0 and at most 1'],
    ),
    '1 bit': (
        dict(weight=dict(bits=1)),
        ["the recipe's weight", 'bits=1', 'integer from 2 to 8, or None'],
    ),
    '9 bits': (dict(weight=dict(bits=9)), ['bits=9', 'from 2 to 8']),
    'bits as text': (dict(weight=dict(bits='4')), ["bits='4'", 'from 2 to 8']),
    'bits as truth': (dict(weight=dict(bits=True)), ['bits=True', 'from 2 to 8']),
    '1 activation bit': (
        dict(weight=WEIGHT, activation=dict(bits=1)),
        ["the recipe's activation", 'bits=1', 'from 2 to 8'],
    ),
    'unknown codes': (
        dict(weight=dict(bits=4, codes='symetric')),
        ["the recipe's weight", "codes='symetric'", "nearest: 'symmetric'", 'choose one of'],
    ),
    'a list of codes': (dict(weight=dict(bits=4, codes=['lsq'])), ["codes=['lsq']", 'choose']),
    'unknown step': (
        dict(weight=dict(bits=4, step='channels')),
        ["the recipe's weight step is 'channels'", "nearest: 'channel'"],
    ),
    'unknown gradient': (
        dict(weight=WEIGHT, gradient='srste'),
        ["the recipe's gradient is 'srste'", "nearest: 'sr_ste'"],
    ),
    'unknown order': (
        dict(weight=WEIGHT, order='q_then_p'),
        ["the recipe's order is 'q_then_p'", "nearest: 'q_then_s'"],
    ),
    'nothing to do': (dict(weight={}), ['compresses nothing', 'give weight sparsity']),
    'nothing to do, in many words': (
        dict(weight=dict(bits=None), activation=None, rules=[dict(match='head', compress=True)]),
        ['compresses nothing', 'or in a rule'],
    ),
    'rules are a dict': (dict(W4A4, rules=dict(match='head')), ['rules are not a list']),
    'rules are a text': (dict(W4A4, rules='head'), ['rules are not a list']),
    'rule is a text': (rules('head'), ["rule 0 of the recipe is 'head'", "write dict(match='...'"]),
    'rule without match': (
        rules(dict(match='head'), dict(compress=False)),
        ["rule 1 of the recipe has no 'match'", "'re:...', 'type:...' or 'in:...'"],
    ),
    'empty match': (rules(dict(match='')), ["has no 'match'"]),
    'unknown rule key': (
        rules(dict(match='head', wight=WEIGHT)),
        ["rule 0 of the recipe has the unknown key 'wight'", "nearest: 'weight'"],
    ),
    'bad bits in a rule': (
        rules(dict(match='neck'), dict(match='head', weight=dict(bits=12))),
        ["rule 1 of the recipe (match='head')'s weight", 'bits=12', 'from 2 to 8'],
    ),
    'bad pattern in a rule': (
        rules(dict(match='head', weight=dict(sparsity='8:2'))),
        ["(match='head')", "did you mean '2:8'"],
    ),
    'bad activation in a rule': (
        rules(dict(match='head', activation=dict(bits=0))),
        ["(match='head')'s activation", 'bits=0'],
    ),
    'bad gradient in a rule': (
        rules(dict(match='head', gradient='st')),
        ["(match='head'): gradient is 'st'", "nearest: 'ste'"],
    ),
    'bad order in a rule': (rules(dict(match='head', order=1)), ["(match='head'): order is 1"]),
    'compress is no truth': (
        rules(dict(match='head', compress='no')),
        ["(match='head') has compress='no'", 'True or False'],
    ),
    'bad expression': (
        rules(dict(match='re:(')),
        ["(match='re:(') is not a regular expression"],
    ),
    'rule matches nothing': (
        rules(dict(match='head'), dict(match='hed.fc')),
        ["match='hed.fc' matches no layer", "nearest: 'head.fc'", 'correct or remove it'],
    ),
    'prefix matches nothing': (
        rules(dict(match='backbone.layer2', weight=dict(bits=8))),
        ["match='backbone.layer2' matches no layer", "'backbone.layer1'"],
    ),
    'half a name': (
        rules(dict(match='backbone.lay')),
        ["match='backbone.lay' matches no layer", 'nearest:'],
    ),
    'expression matches nothing': (
        rules(dict(match='re:conv1')),
        ["match='re:conv1' matches no layer", 'nearest:'],
    ),
    'type matches nothing': (
        rules(dict(match='type:Conv3d')),
        ["match='type:Conv3d' matches no layer", 'correct or remove'],
    ),
    'a norm cannot be compressed': (rules(dict(match='type:BatchNorm2d')), ['matches no layer']),
    'a pattern no layer can hold': (
        dict(weight=dict(sparsity='2:31', bits=4)),
        ["no layer of this model can hold the recipe's sparsity '2:31'", '16 input channels',
         'choose another pattern'],
    ),
    'a pattern no layer can hold, without bits': (
        dict(weight=dict(sparsity='2:31')),
        ['compresses no layer of this model', 'hold no 2:31', 'choose another pattern'],
    ),
    'everything excluded': (
        rules(dict(match='re:.*', compress=False)),
        ['compresses no layer of this model', "rule 're:.*'", 'change the rules'],
    ),
}  # fmt: skip


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a conversion could have touched."""
    return [
        (name, id(module), type(module), sorted(vars(module)), list(module._buffers))
        for name, module in model.named_modules(remove_duplicate=False)
    ] + [
        (name, id(tensor), tensor.detach().numpy().tobytes())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]


@pytest.mark.parametrize('case', REFUSED)
def test_bad_input_is_told_what_where_and_what_to_do(case: str) -> None:
    recipe, parts = REFUSED[case]
    model = Net()
    before = fingerprint(model)
    with pytest.raises(RecipeError) as raised:
        slope_mm.convert(model, recipe)
    for part in parts:
        assert part in str(raised.value)
    assert fingerprint(model) == before


BREAKS = st.sampled_from(
    [
        lambda recipe: recipe['weight'].update(bits=1),
        lambda recipe: recipe['weight'].update(sparsity='3:2'),
        lambda recipe: recipe['weight'].update(extra=1),
        lambda recipe: recipe.update(activation=dict(bits=99)),
        lambda recipe: recipe.update(gradient='none'),
        lambda recipe: recipe.update(extra=None),
        lambda recipe: recipe.setdefault('rules', []).append(dict(match='nowhere')),
        lambda recipe: recipe.setdefault('rules', []).insert(0, dict(match='type:Conv1d')),
        lambda recipe: recipe.setdefault('rules', []).append(dict(match='head', weight=4)),
        lambda recipe: recipe.setdefault('rules', []).append(dict(match='re:.*', compress=False)),
    ]
)


@settings(deadline=None, max_examples=60)
@given(RECIPES, BREAKS)
def test_a_refused_recipe_leaves_the_model_untouched(
    given_recipe: dict[str, Any], spoil: Callable[[dict[str, Any]], None]
) -> None:
    recipe = copy.deepcopy(given_recipe)
    spoil(recipe)
    model = Net()
    before = fingerprint(model)
    with pytest.raises(RecipeError):
        slope_mm.convert(model, recipe)
    assert fingerprint(model) == before


def test_the_fingerprint_notices_a_conversion() -> None:
    model = Net()
    before = fingerprint(model)
    slope_mm.convert(model, W4A4)
    assert fingerprint(model) != before


# --- the built-in rules --------------------------------------------------------------------------


def edge_names(model: nn.Module) -> set[str]:
    """The layers that the built-in rules keep gentler."""
    found = slope_mm.plan(model, dict(weight=dict(bits=4), activation=dict(bits=4)))
    edges = {p.name for p in found if p.reason in ('stem', 'prediction layer')}
    for planned in found:
        if planned.name in edges:
            assert planned.spec is not None
            assert (planned.spec.pattern, planned.spec.bits) == (None, 8)
            assert planned.spec.activation_bits == 8
    return edges


def levels(*names: str, count: int = 3) -> set[str]:
    return {f'{name}.{i}' for name in names for i in range(count)}


ONE_ANCHOR = dict(
    type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8]
)
POINTS = dict(type='MlvlPointGenerator', offset=0, strides=[8, 16, 32])
DISTANCES = dict(type='DistancePointBBoxCoder')
# Real heads, and the layers in them that predict. Whatever else they hold follows the recipe.
HEADS: dict[str, tuple[dict[str, Any], set[str]]] = {
    'RPNHead': (dict(feat_channels=8), {'rpn_cls', 'rpn_reg'}),
    'Shared2FCBBoxHead': (dict(fc_out_channels=8, roi_feat_size=2), {'fc_cls', 'fc_reg'}),
    'Shared4Conv1FCBBoxHead': (
        dict(conv_out_channels=8, fc_out_channels=8, roi_feat_size=2),
        {'fc_cls', 'fc_reg'},
    ),
    'FCNMaskHead': (dict(num_convs=2, conv_out_channels=8), {'conv_logits'}),
    'MaskIoUHead': (
        dict(num_convs=2, num_fcs=1, roi_feat_size=4, conv_out_channels=8, fc_out_channels=8),
        {'fc_mask_iou'},
    ),
    'RetinaHead': (dict(feat_channels=8, stacked_convs=2), {'retina_cls', 'retina_reg'}),
    'RetinaSepBNHead': (
        dict(num_ins=2, feat_channels=8, stacked_convs=2),
        {'retina_cls', 'retina_reg'},
    ),
    'ATSSHead': (
        dict(feat_channels=32, stacked_convs=2, anchor_generator=ONE_ANCHOR),
        {'atss_cls', 'atss_reg', 'atss_centerness'},
    ),
    'FCOSHead': (
        dict(feat_channels=32, stacked_convs=2),
        {'conv_cls', 'conv_reg', 'conv_centerness'},
    ),
    'GFLHead': (
        dict(feat_channels=32, stacked_convs=2, anchor_generator=ONE_ANCHOR),
        {'gfl_cls', 'gfl_reg'},
    ),
    'YOLOXHead': (
        dict(feat_channels=8),
        levels('multi_level_conv_cls', 'multi_level_conv_reg', 'multi_level_conv_obj'),
    ),
    'RTMDetSepBNHead': (
        dict(feat_channels=8, anchor_generator=POINTS, bbox_coder=DISTANCES),
        levels('rtm_cls', 'rtm_reg', 'rtm_obj'),
    ),
    'RTMDetInsSepBNHead': (
        dict(feat_channels=8, anchor_generator=POINTS, bbox_coder=DISTANCES),
        levels('rtm_cls', 'rtm_reg', 'rtm_kernel'),
    ),
    'RepPointsHead': (
        dict(feat_channels=8, point_feat_channels=8, stacked_convs=2),
        {'reppoints_cls_out', 'reppoints_pts_init_out', 'reppoints_pts_refine_out'},
    ),
    'YOLOV3Head': (dict(in_channels=[8] * 3, out_channels=[8] * 3), levels('convs_pred')),
    'YOLACTHead': (dict(feat_channels=8), {'conv_cls', 'conv_reg', 'conv_coeff'}),
}


@pytest.mark.parametrize('head', HEADS)
def test_prediction_layers_of_real_heads(head: str) -> None:
    register_all_modules(init_default_scope=False)
    options, expected = HEADS[head]
    if head != 'RPNHead':
        options = dict(options, num_classes=2)
    with MMDET_MODELS.switch_scope_and_registry('mmdet'):
        model = MMDET_MODELS.build(dict(type=head, **{'in_channels': 8, **options}))
    assert edge_names(model) == expected


def reason(name: str, channels: int = 64) -> str:
    """Of the last built-in rule for a layer of this name, ``''`` if none speaks of it."""
    matching = [
        rule.reason
        for rule in Recipe.parse(W4A4).all_rules
        if rule.matches([name], ['Conv2d'], channels)
    ]
    return matching[-1] if matching else ''


@pytest.mark.parametrize(
    'name',
    [
        'rpn_head.rpn_cls',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.2.fc_reg',
        'roi_head.mask_head.conv_logits',
        'roi_head.mask_head.0.conv_logits',
        'bbox_head.cls_branches.5',
        'bbox_head.conv_centerness',
        'mask_head.conv_kernel',
        'panoptic_head.cls_embed',
        'decode_head.conv_seg',
        'bbox_head.heatmap_head.2',
        'bbox_head.reg_branches.5.4',
        'bbox_head.vfnet_reg_refine',
        'rpn_head.conv_loc',
        'mask_head.conv_mask_list.4',
        'mask_feature_head.conv_pred.conv',
        'fc_cls',
    ],
)
def test_names_of_prediction_layers(name: str) -> None:
    assert reason(name) == 'prediction layer'


@pytest.mark.parametrize(
    'name',
    [
        'bbox_head.cls_convs.0.conv',
        'bbox_head.reg_convs.3.conv',
        'bbox_head.multi_level_cls_convs.0.1.conv',
        'bbox_head.kernel_convs.0.0.conv',
        'bbox_head.reppoints_cls_conv',
        'bbox_head.cls_fcs.0',
        'bbox_head.heatmap_head.0',
        'bbox_head.reg_branches.5.2',
        'bbox_head.reg_fcs.0',
        'rpn_head.rpn_conv',
        'roi_head.mask_head.convs.1.conv',
        'roi_head.mask_head.upsample',
        'roi_head.bbox_head.shared_fcs.0',
        'neck.lateral_convs.0.conv',
        'neck.fpn_convs.2.conv',
        'backbone.layer1.0.conv1',
        'backbone.layer4.0.downsample.0',
        'backbone.stages.0.blocks.0.attn.w_msa.qkv',
        'backbone.regular.conv',
        'backbone.system.conv',
        'backbone.stem_like.conv',
        'decoder.layers.0.ffn.layers.0.0',
    ],
)
def test_names_that_follow_the_recipe(name: str) -> None:
    assert reason(name) == ''


@pytest.mark.parametrize('name', ['backbone.stem.0', 'backbone.stem.conv.conv', 'stem', 'a.stem.1'])
def test_names_of_stems(name: str) -> None:
    assert reason(name) == 'stem'


def test_whatever_reads_the_image_is_a_stem() -> None:
    assert reason('backbone.conv1', channels=3) == 'stem'
    assert reason('backbone.patch_embed.projection', channels=3) == 'stem'
    assert reason('backbone.conv1', channels=64) == ''


def test_offsets_of_deformable_convolutions_stay_as_they_are() -> None:
    assert reason('backbone.layer2.0.conv2.conv_offset') == 'sampling offsets'
    model = nn.ModuleDict(dict(conv_offset=nn.Conv2d(8, 18, 3), conv=nn.Conv2d(8, 8, 3)))
    assert specs(W4A4, model)['conv_offset'] is None


def test_built_in_rules_may_match_nothing() -> None:
    assert set(specs(W4A4, nn.Sequential(nn.Linear(8, 8)))) == {'0'}


def test_edges_follow_what_the_recipe_quantizes_at_all() -> None:
    edge = specs(dict(weight=WEIGHT))['backbone.conv1']
    assert edge is not None and (edge.bits, edge.activation_bits) == (8, None)
    edge = specs(dict(weight=dict(sparsity='2:4'), activation=dict(bits=4)))['backbone.conv1']
    assert edge is not None and (edge.bits, edge.activation_bits) == (None, 8)
    assert specs(dict(weight=dict(sparsity='2:4')))['backbone.conv1'] is None


def test_edges_of_the_small_mask_rcnn() -> None:
    config = Config.fromfile(CONFIGS / '_base_/models/mask_rcnn_r18_small.py').model
    register_all_modules(init_default_scope=False)
    with MMDET_MODELS.switch_scope_and_registry('mmdet'):
        model = MMDET_MODELS.build(config)
    assert edge_names(model) == {
        'backbone.conv1',
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg',
        'roi_head.mask_head.conv_logits',
    }


def test_a_rule_knows_all_names_of_a_shared_layer() -> None:
    shared = nn.Conv2d(8, 8, 1)
    model = nn.ModuleDict(dict(first=nn.Sequential(shared), second=nn.Sequential(shared)))
    for match in ('first', 'second', 'second.0', 're:second.*'):
        found = specs(dict(W4A4, rules=[dict(match=match, weight=dict(bits=7))]), model)
        assert {name: made.bits for name, made in found.items() if made} == {'first.0': 7}
