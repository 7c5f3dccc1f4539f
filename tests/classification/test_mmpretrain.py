"""mmpretrain's classifiers through the shipped configs; skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from mmengine.config import Config

import slope_mm
from slope_mm.engine.launch import build_model, read_config
from slope_mm.studies.study_file import read_study

CONFIGS = tiny.ROOT / 'configs' / 'classification'
# Parameters of the stock models.
SIZES = {
    'resnet18': 11_689_512,
    'resnet50': 25_557_032,
    'deit_small': 22_050_664,
    'vit_small': 22_050_664,
}


def read(name: str) -> Config:
    return read_config(str(CONFIGS / f'{name}.py'))


@pytest.mark.parametrize(
    ('net', 'bits'), [('resnet18', 2), ('resnet50', 4), ('deit_small', 2), ('vit_small', 4)]
)
def test_a_stock_classifier_is_compressed(mmpretrain: ModuleType, net: str, bits: int) -> None:
    stock = build_model(read(f'{net}_in1k_fp32'))
    config = read(f'{net}_in1k_slope_w{bits}')
    model = build_model(config)
    assert type(model) is type(stock) is mmpretrain.models.ImageClassifier
    assert sum(p.numel() for p in stock.parameters()) == SIZES[net]
    added = [n for n, _ in model.named_parameters() if n.rsplit('.', 1)[-1] == 'slope_step']
    assert set(dict(stock.named_parameters())) == set(dict(model.named_parameters())) - set(added)
    layers = slope_mm.compressed_layers(model)
    specs = {
        name: (str(s.slope_spec.pattern and s.slope_spec.pattern.name), s.slope_spec.bits)
        for name, s in layers.items()
    }
    (head,) = [name for name in specs if name.startswith('head')]
    assert specs.pop(head) == ('None', 8)
    stem = 'backbone.conv1' if 'resnet' in net else 'backbone.patch_embed.projection'
    assert specs.pop(stem) == ('None', 8)
    assert set(specs.values()) == {('2:4', bits)}
    totals = slope_mm.report(model).totals
    assert totals['compressed_share'] > 0.99 and totals['ratio'] > 9


@pytest.mark.parametrize('net', ['deit_small', 'vit_small'])
def test_attention_is_compressed(mmpretrain: ModuleType, net: str) -> None:
    layers = slope_mm.compressed_layers(build_model(read(f'{net}_in1k_slope_w4')))
    for index in range(12):
        for part in ('qkv', 'proj'):
            layer = layers[f'backbone.layers.{index}.attn.{part}']
            kept = layer.mask.reshape(layer.weight.shape[0], -1, 4).sum(-1)
            assert bool((kept == 2).all())


def test_the_arms_of_a_network_share_start_and_schedule(mmpretrain: ModuleType) -> None:
    for net in SIZES:
        fp32 = read(f'{net}_in1k_fp32')
        assert fp32.load_from.startswith('https://download.openmmlab.com/')
        for bits in (4, 2):
            arm = read(f'{net}_in1k_slope_w{bits}')
            for key in ('load_from', 'train_cfg', 'param_scheduler', 'train_dataloader'):
                assert arm[key] == fp32[key], key


def test_a_small_deit_trains_and_is_evaluated(
    mmpretrain: ModuleType, images: Path, tmp_path: Path
) -> None:
    config = read('deit_sign_digits_slope_w2')
    config.load_from, config.work_dir = None, str(tmp_path / 'run')
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.dataset.data_root, loader.batch_size = str(images), 40
    config.merge_from_dict({'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1})
    config.default_hooks.logger.interval = config.log_processor.window_size = 1
    config.custom_hooks[-1].update(interval=1, picture=False)
    run = tiny.train(tiny.name_run(config))
    rows = tiny.read_losses(config.work_dir)
    assert len(rows) == 2 and all(0.5 < row['slope_cosine_mean'] < 1 for row in rows)
    assert any('accuracy/top1' in row for row in tiny.read_scalars(config.work_dir))
    # The baked model is mmpretrain's own, with the compressed weights.
    stock = build_model(read('deit_sign_digits_fp32')).eval()
    stock.load_state_dict(slope_mm.bake(run.model).state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(stock(x), run.model.eval()(x), atol=1e-5)


def test_the_study_of_imagenet_has_the_arms_of_the_paper() -> None:
    study = read_study(tiny.ROOT / 'configs/studies/12_imagenet.py')
    assert [task.name for task in study.tasks] == list(SIZES)
    assert study.not_run
    kinds = {arm.name.split(' ')[0] for arm in study.arms}
    assert kinds == {'fp32', 'dense', 'naive', 'L2', 'SLOPE'}
