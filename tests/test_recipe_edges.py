"""The built-in rules: which layers of real heads, and which names, they keep gentler."""

from __future__ import annotations

from typing import Any

import pytest
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from recipe_cases import CONFIGS, W4A4, WEIGHT, specs
from torch import nn

import slope_mm
from slope_mm import Recipe


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


@pytest.mark.parametrize(('codes', 'edge'), [('odd', 'symmetric'), ('lsq', 'lsq')])
def test_edges_have_a_zero_among_their_levels(codes: str, edge: str) -> None:
    found = specs(dict(weight=dict(sparsity='2:4', bits=2, codes=codes)))
    assert found['backbone.conv1'] is not None and found['neck.0'] is not None
    assert (found['backbone.conv1'].codes, found['neck.0'].codes) == (edge, codes)
    kept = dict(match='backbone.conv1', weight=dict(codes=codes))
    found = specs(dict(weight=dict(sparsity='2:4', bits=2, codes=codes), rules=[kept]))
    assert found['backbone.conv1'] is not None and found['backbone.conv1'].codes == codes


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
