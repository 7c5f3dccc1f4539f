"""SlopeModel: the stock object with compressed layers, wherever it is built or loaded."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.models import MaskRCNN
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

import slope_mm
from slope_mm import CheckpointError, ConfigError, RecipeError, compressed_layers
from slope_mm.layers.kinds import SlopeConv2d, stock_type
from slope_mm.ops import mse_init_step, weight_codes

MakeConfig = Callable[..., Config]


@pytest.fixture
def config(tiny_config: MakeConfig, tmp_path: Path) -> Config:
    return tiny_config(tmp_path)


# --- building ------------------------------------------------------------------------------------


def test_the_stock_object_comes_back(config: Config, dense_run: tiny.Run) -> None:
    model = tiny.build(config)
    assert type(model) is MaskRCNN
    assert isinstance(model.backbone.layer1[0].conv1, SlopeConv2d)
    assert type(model.backbone.layer1[0].bn1) is nn.BatchNorm2d
    stock = dense_run.model
    own_keys = [key for key in model.state_dict() if '.slope_' not in key]
    assert own_keys == list(stock.state_dict())
    classes = [stock_type(module) for module in model.modules()]
    assert classes == [type(module) for module in stock.modules()]


def test_types_resolve_in_a_process_that_never_imported_slope_mm(tmp_path: Path) -> None:
    """Without custom_imports, in mmdet's default scope and below ``mmdet::`` (``_scope_``)."""
    (tmp_path / 'inherits.py').write_text(
        """
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py']
model = dict(
    type='slope_mm.SlopeModel',
    arch='MaskRCNN',
    recipe=dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4)),
    backbone=dict(depth=18, base_channels=8, frozen_stages=-1),
    neck=dict(in_channels=[8, 16, 32, 64]))
optim_wrapper = dict(
    constructor='slope_mm.SlopeOptimWrapperConstructor', regularizer=dict(type='cosine'))
custom_hooks = [dict(type='slope_mm.SlopeMonitorHook')]
"""
    )
    script = """
import sys
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
config = Config.fromfile(sys.argv[1])
assert config.model._scope_ == config.optim_wrapper._scope_ == 'mmdet'
init_default_scope('mmdet')
assert 'slope_mm' not in sys.modules
model = MODELS.build(config.model)
wrapper = build_optim_wrapper(model, config.optim_wrapper)
hook = HOOKS.build(config.custom_hooks[0])
saving = HOOKS.build(config.default_hooks.checkpoint)  # the Runner builds hooks after the model
made = (model, model.backbone.layer1[0].conv1, wrapper, hook, saving)
print([type(x).__name__ for x in made])
"""
    done = subprocess.run(
        [sys.executable, '-c', script, tmp_path / 'inherits.py'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kinds = ['MaskRCNN', 'SlopeConv2d', 'SlopeOptimWrapper', 'SlopeMonitorHook']
    assert done.stdout.splitlines()[-1] == str([*kinds, 'SlopeCheckpointHook'])


def test_without_arch(config: Config) -> None:
    del config.model['arch']
    with pytest.raises(ConfigError, match="no 'arch'.*arch='MaskRCNN'"):
        tiny.build(config)


def test_unknown_arch_names_the_nearest(config: Config) -> None:
    config.model.arch = 'MaskRCN'
    with pytest.raises(ConfigError, match="model.arch='MaskRCN'.*nearest: 'MaskRCNN'"):
        tiny.build(config)


def test_without_recipe(config: Config) -> None:
    del config.model['recipe']
    with pytest.raises(ConfigError, match="no 'recipe'"):
        tiny.build(config)


def test_a_broken_recipe_is_refused_before_the_model_is_built(config: Config) -> None:
    config.model.recipe = dict(weight=dict(sparsity='4:2'))
    config.model.backbone = dict(type='NoSuchBackbone')
    with pytest.raises(RecipeError, match='4:2'):
        tiny.build(config)


def test_options_reach_the_flat_model_section(config: Config) -> None:
    config.merge_from_dict(
        {
            'model.backbone.depth': 34,
            'model.roi_head.bbox_head.fc_out_channels': 48,
            'model.recipe.weight.bits': 2,
            'model.recipe.rules': [dict(match='roi_head.mask_head', compress=False)],
        }
    )
    model = tiny.build(config)
    assert len(model.backbone.layer1) == 3
    assert model.roi_head.bbox_head.shared_fcs[0].out_features == 48
    layers = compressed_layers(model)
    assert layers['neck.fpn_convs.0.conv'].slope_spec.bits == 2
    assert not [name for name in layers if name.startswith('roi_head.mask_head')]


# --- loading -------------------------------------------------------------------------------------


def test_stock_checkpoint_loads_without_noise(dense_run: tiny.Run, slope_run: tiny.Run) -> None:
    """Through the Runner (``load_from``), whose log tells every key that does not fit."""
    log = tiny.read_log(slope_run.config.work_dir)
    assert f'Load checkpoint from {dense_run.checkpoint}' in log
    for noise in ('missing keys', 'unexpected key', 'do not match', 'size mismatch'):
        assert noise not in log


def test_stock_checkpoint_loads_strictly(config: Config, dense_run: tiny.Run) -> None:
    model = tiny.build(config)
    load_checkpoint(model, str(dense_run.checkpoint), map_location='cpu', strict=True)
    loaded = tiny.state_of(model)
    assert not [key for key, w in dense_run.model.state_dict().items() if (loaded[key] != w).any()]


def test_steps_follow_the_weights_that_init_cfg_loads(config: Config, dense_run: tiny.Run) -> None:
    config.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(dense_run.checkpoint), prefix='backbone.'
    )
    model, trained = tiny.build(config), dense_run.model
    conv = model.backbone.layer2[0].conv1
    weight = trained.backbone.layer2[0].conv1.weight
    assert torch.equal(conv.weight, weight)
    # A step of the initial weights would clip these, or waste its levels on them.
    error = (conv.compressed_weight() - weight * conv.mask).norm() / (weight * conv.mask).norm()
    assert error < 0.15
    assert (conv.codes().abs().amax((1, 2, 3)) >= 6).all()


@pytest.mark.parametrize('route', ['mmengine', 'torch'])
def test_another_architecture_is_refused_before_loading(
    config: Config, dense_run: tiny.Run, route: str
) -> None:
    config.model.backbone.depth = 34
    config.model.neck.out_channels = config.model.rpn_head.in_channels = 32
    config.model.rpn_head.feat_channels = 32
    config.model.roi_head.bbox_head.fc_out_channels = 64
    model = tiny.build(config)
    before = tiny.state_of(model)
    with pytest.raises(CheckpointError, match='another architecture than MaskRCNN: .* weights fit'):
        if route == 'mmengine':
            load_checkpoint(model, str(dense_run.checkpoint), map_location='cpu')
        else:
            model.load_state_dict(dense_run.model.state_dict(), strict=False)
    assert not tiny.differing(before, tiny.state_of(model))


def test_replaced_heads_still_load(config: Config, dense_run: tiny.Run) -> None:
    """Fine-tuning on other classes: what fits is loaded."""
    config.merge_from_dict(
        {
            'model.roi_head.bbox_head.num_classes': 3,
            'model.roi_head.mask_head.num_classes': 3,
        }
    )
    model = tiny.build(config)
    load_checkpoint(model, str(dense_run.checkpoint), map_location='cpu')
    trained = dense_run.model
    assert torch.equal(model.backbone.conv1.weight, trained.backbone.conv1.weight)
    assert torch.equal(model.rpn_head.rpn_conv.weight, trained.rpn_head.rpn_conv.weight)


@pytest.mark.parametrize(
    'change',
    [{'bits': 2}, {'sparsity': '1:4'}, {'codes': 'odd'}, {'step': 'tensor'}],
    ids=str,
)
def test_another_recipe_is_refused_before_loading(
    config: Config, slope_run: tiny.Run, change: dict
) -> None:
    config.model.recipe.weight.update(change)
    model = tiny.build(config)
    before = tiny.state_of(model)
    with pytest.raises(CheckpointError, match=r"layer 'backbone.* compressed as .* recipe says"):
        load_checkpoint(model, str(slope_run.checkpoint), map_location='cpu')
    assert not tiny.differing(before, tiny.state_of(model))


def test_a_recipe_that_spares_a_compressed_layer_is_refused(
    config: Config, slope_run: tiny.Run
) -> None:
    config.model.recipe.rules = [dict(match='rpn_head.rpn_conv', compress=False)]
    model = tiny.build(config)
    with pytest.raises(CheckpointError, match="'rpn_head.rpn_conv' was compressed, but .* alone"):
        load_checkpoint(model, str(slope_run.checkpoint), map_location='cpu')


# --- inference -----------------------------------------------------------------------------------


def images(run: tiny.Run) -> list[str]:
    return sorted(map(str, Path(run.config.val_dataloader.dataset.data_root).glob('val/*.png')))


def test_init_detector_predicts_what_the_trained_model_predicts(slope_run: tiny.Run) -> None:
    detector = init_detector(str(slope_run.file), str(slope_run.checkpoint), device='cpu')
    assert not tiny.differing(tiny.state_of(detector), tiny.state_of(slope_run.model))
    trained = slope_run.model.eval()
    trained.cfg = copy.deepcopy(slope_run.config)
    wanted = inference_detector(trained, images(slope_run))
    found = inference_detector(detector, images(slope_run))
    assert sum(len(sample.pred_instances) for sample in wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.pred_instances.bboxes, b.pred_instances.bboxes)
        assert torch.equal(a.pred_instances.scores, b.pred_instances.scores)
        assert np.array_equal(a.pred_instances.masks, b.pred_instances.masks)


def test_det_inferencer_predicts_what_the_trained_model_predicts(slope_run: tiny.Run) -> None:
    inferencer = DetInferencer(str(slope_run.file), str(slope_run.checkpoint), device='cpu')
    trained = slope_run.model.eval()
    trained.cfg = copy.deepcopy(slope_run.config)
    wanted = inference_detector(trained, images(slope_run))
    found = inferencer(images(slope_run), no_save_vis=True, batch_size=1)['predictions']
    assert sum(len(prediction['scores']) for prediction in found) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a['scores'] == b.pred_instances.scores.tolist()
        assert np.allclose(a['bboxes'], b.pred_instances.bboxes.numpy(), atol=1e-4)


def test_inference_computes_with_compressed_layers(slope_run: tiny.Run) -> None:
    """A detector that comes up dense in silence would pass the tests above only by its twin."""
    detector = init_detector(str(slope_run.file), str(slope_run.checkpoint), device='cpu')
    seen: dict[str, torch.Tensor] = {}
    conv = detector.backbone.layer1[0].conv1

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen['input'], seen['output'] = inputs[0], output

    conv.register_forward_hook(keep)
    inference_detector(detector, images(slope_run)[0])
    step = conv.slope_act_step.detach()
    quantized = (seen['input'] / step).round().clamp(0, 15) * step
    wanted = torch.nn.functional.conv2d(quantized, conv.compressed_weight(), padding=1)
    assert torch.allclose(seen['output'], wanted, atol=1e-5)
    kept = (conv.compressed_weight() != 0).unflatten(1, (-1, 4)).sum(2)
    assert int(kept.max()) <= 2


def test_arch_may_be_a_class() -> None:
    init_default_scope('mmengine')
    model = MODELS.build(
        dict(type='slope_mm.SlopeModel', arch=tiny.ToyNet, recipe=tiny.TOY_RECIPE, spare=True)
    )
    assert type(model) is tiny.ToyNet
    assert list(compressed_layers(model)) == ['first', 'twice', 'mix', 'spare']


class DrawnAtRandom(BaseModel):
    """Initialises itself as detectors of DETR's family do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 64)

    def init_weights(self) -> None:
        super().init_weights()
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_initialisers_do_not_draw_steps_at_random() -> None:
    recipe = dict(weight=dict(sparsity='2:4', bits=4))
    model = MODELS.build(dict(type='slope_mm.SlopeModel', arch=DrawnAtRandom, recipe=recipe))
    for one in (model, copy.deepcopy(model)):
        first = one.linear.weight.detach().clone()
        one.init_weights()
        layer = one.linear
        assert not torch.equal(layer.weight, first)
        expected = mse_init_step(layer.weight, weight_codes('lsq', 4), 0, layer.mask)
        torch.testing.assert_close(layer.step.detach(), expected)
    assert 'init_weights' not in vars(slope_mm.bake(model))
