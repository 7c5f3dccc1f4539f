"""Which configs stand for a zoo, on a folder of a few."""

from __future__ import annotations

from pathlib import Path

import pytest

from slope_mm.zoo.catalogue import Entry, catalogue


def config(kind: str, depth: int = 50, **options: object) -> str:
    head = ', '.join(f'{key}={value!r}' for key, value in options.items())
    return (
        f"model = dict(type='{kind}', backbone=dict(type='ResNet', depth={depth},"
        f" init_cfg=dict(type='Pretrained')), bbox_head=dict({head}))\n"
    )


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    files = {
        '_base_/models/fcos.py': config('FCOS'),
        'fcos/fcos_r101_coco.py': config('FCOS', 101, channels=8),
        'fcos/fcos_r18_long_name_coco.py': config('FCOS', 18, channels=8),
        'fcos/fcos_r50_coco.py': config('FCOS', channels=8, num_classes=80),
        'fcos/fcos_r50_ms-2x_coco.py': config('FCOS', channels=8),
        'faces/fcos_r50_faces.py': config('FCOS', channels=8, num_classes=1),
        'faces/wide_r50_faces.py': config('ATSS', channels=16),
        'tta/only_tta.py': 'img_scales = [1]\n',
        'broken/lost_base.py': "_base_ = './gone.py'\n",
        'broken/lost_base_too.py': "_base_ = './gone.py'\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def entries(zoo: Path) -> dict[str, Entry]:
    return {entry.config: entry for entry in catalogue(zoo)}


def test_one_config_stands_for_folder_detector_and_backbone(entries: dict[str, Entry]) -> None:
    assert sorted(entries) == [
        'broken/lost_base.py',
        'faces/fcos_r50_faces.py',
        'faces/wide_r50_faces.py',
        'fcos/fcos_r50_coco.py',
    ]


def test_a_model_that_differs_in_classes_and_weights_alone_is_a_repetition(
    entries: dict[str, Entry],
) -> None:
    assert entries['faces/fcos_r50_faces.py'].same_as == 'fcos/fcos_r50_coco.py'
    assert entries['faces/wide_r50_faces.py'].same_as == ''
    assert entries['fcos/fcos_r50_coco.py'].same_as == ''


def test_a_config_that_cannot_be_read_is_listed_with_its_reason(
    entries: dict[str, Entry],
) -> None:
    assert 'FileNotFoundError' in entries['broken/lost_base.py'].problem


def test_entries_name_detector_and_backbone(entries: dict[str, Entry]) -> None:
    entry = entries['faces/wide_r50_faces.py']
    assert (entry.folder, entry.detector, entry.backbone) == ('faces', 'ATSS', 'ResNet')
