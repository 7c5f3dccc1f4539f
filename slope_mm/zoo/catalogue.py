"""Which configs of the installed mmdet stand for its zoo, and a few of mmpretrain's and mmseg's.

One config per model folder, detector class and backbone class. Of several the one nearest to the
usual size stands for all: ResNet-50 where there is one, else the smallest; then the shortest name.
A model section that another entry has already, apart from its number of classes, pretrained
weights, preprocessing and test settings, is listed and not run again.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils import get_installed_path

# Folders without a model of their own: parts, and what mmdet includes everywhere.
PARTS = ('_base_', 'common')
# Beside the rule's choice: variants of a family whose layers no other config has.
EXTRA = (
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py',
    'dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py',
    'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
    'detectors/cascade-rcnn_r50-sac_1x_coco.py',
    'gcnet/mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco.py',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    'nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py',
    'nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss-normed-mask_random-ms-2x_lvis-v1.py',
    'tood/tood_r50_fpn_anchor-based_1x_coco.py',
    'vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py',
)
# Models of mmdet's relatives, a network each.
RELATIVES = (
    'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py',
    'mmpretrain::deit/deit-small_4xb256_in1k.py',
    'mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k.py',
    'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py',
    'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
    'mmpretrain::poolformer/poolformer-s12_32xb128_in1k.py',
    'mmpretrain::resnet/resnet18_8xb32_in1k.py',
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    'mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py',
    'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py',
    'mmseg::ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py',
    'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
)
# What makes no other model: weights, data, and what is done before and after it.
IGNORED = ('init_cfg', 'data_preprocessor', 'test_cfg', 'num_classes', '_scope_')


@dataclass(frozen=True)
class Entry:
    """One config of the zoo.

    Attributes:
        config: Its path below mmdet's configs; ``PACKAGE::`` before it where it is another's.
        folder: Model folder, with the same prefix.
        detector: Class name of the model.
        backbone: Class name of its backbone.
        problem: Why it cannot be read, or ``''``.
        same_as: The config whose model it repeats, or ``''``.
    """

    config: str
    folder: str
    detector: str = ''
    backbone: str = ''
    problem: str = ''
    same_as: str = ''


def config_root(package: str = 'mmdet') -> Path:
    """Where an installed package keeps its configs."""
    return Path(get_installed_path(package)) / '.mim' / 'configs'


def config_path(name: str) -> Path:
    """The file of an entry's ``config``."""
    package, _, path = name.rpartition('::')
    return config_root(package or 'mmdet') / path


def read(path: Path) -> Config:
    """Reads a stock config."""
    with warnings.catch_warnings():
        # mmengine's and mmdet's, about stock configs.
        warnings.simplefilter('ignore')
        return Config.fromfile(str(path))


def one_line(error: BaseException, length: int = 160) -> str:
    """An exception as ``Type: first line``, without paths of this machine."""
    said = str(error).strip().splitlines()
    text = ' '.join((said[0] if said else '').split()).replace(str(config_root().parents[2]), '…')
    return f'{type(error).__name__}: {text}'[:length].rstrip(': ')


def catalogue(root: Path | None = None) -> list[Entry]:
    """All entries, in the order of their paths.

    Args:
        root: Folder of model folders; None: the installed mmdet's configs.
    """
    root = config_root() if root is None else root
    groups: dict[tuple[str, ...], list[tuple[tuple[Any, ...], Entry, str]]] = {}
    for path in sorted(root.rglob('*.py')):
        name = path.relative_to(root).as_posix()
        folder = name.split('/', 1)[0]
        if set(Path(name).parts) & set(PARTS):
            continue
        try:
            model = read(path).get('model')
        except Exception as error:  # whatever a config raises is what is listed
            problem = one_line(error)
            key: tuple[str, ...] = (folder, 'unread', problem.split(':', 1)[0])
            groups.setdefault(key, []).append(
                ((len(name), name), Entry(name, folder, problem=problem), name)
            )
            continue
        if not isinstance(model, Mapping) or 'type' not in model:
            continue
        backbone = _backbone(model)
        entry = Entry(name, folder, str(model['type']), str(backbone.get('type', '–')))
        key = (folder, entry.detector, entry.backbone)
        if name in EXTRA:
            key = (*key, name)
        groups.setdefault(key, []).append(
            ((*_size(backbone), len(name), name), entry, _fingerprint(model))
        )
    chosen = [min(group, key=lambda item: item[0]) for group in groups.values()]
    return list(_without_repetitions(sorted(chosen, key=lambda item: item[1].config)))


def relatives() -> list[Entry]:
    """The entries of :data:`RELATIVES` whose package is installed."""
    entries = []
    for name in RELATIVES:
        package, folder = name.partition('::')[0], name.split('/', 1)[0]
        if importlib.util.find_spec(package) is None:
            continue
        try:
            model = read(config_path(name)).model
        except Exception as error:  # whatever a config raises is what is listed
            entries.append(Entry(name, folder, problem=one_line(error)))
            continue
        backbone = str(_backbone(model).get('type', '–'))
        entries.append(Entry(name, folder, str(model['type']), backbone))
    return entries


def _backbone(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first backbone of a model or of the detector inside it."""
    found = model.get('backbone')
    if found is None and isinstance(model.get('detector'), Mapping):
        found = model['detector'].get('backbone')
    return found or {}


def _size(backbone: Mapping[str, Any]) -> tuple[float, ...]:
    """Sort key: ResNet-50 first, else from small to large."""
    depth = backbone.get('depth', 0)
    blocks = backbone.get('depths') or backbone.get('num_layers') or ()
    arch = backbone.get('arch', '')
    return (
        abs(depth - 50) if isinstance(depth, int) else 0,
        float(backbone.get('widen_factor', 0)) + float(backbone.get('deepen_factor', 0)),
        float(backbone.get('groups', 1)) * float(backbone.get('base_width', 1)),
        float(backbone.get('embed_dims', 64))
        * sum(blocks if isinstance(blocks, (list, tuple)) else ()),
        float(arch.rsplit('_', 1)[-1].removesuffix('mf').replace('gf', 'e3'))
        if isinstance(arch, str) and arch.startswith('regnet')
        else 0,
    )


def _fingerprint(model: Mapping[str, Any]) -> str:
    return json.dumps(_stripped(model), sort_keys=True, default=str)


def _stripped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _stripped(v) for k, v in value.items() if k not in IGNORED}
    if isinstance(value, (list, tuple)):
        return [_stripped(item) for item in value]
    return value


def _without_repetitions(chosen: list[tuple[tuple[Any, ...], Entry, str]]) -> Iterator[Entry]:
    first: dict[str, str] = {}
    # The folder that a model has its name from stands before folders of data sets and tricks.
    own_first = sorted(chosen, key=lambda item: (_is_borrowed(item[1]), item[1].config))
    for _, entry, print_ in own_first:
        if not entry.problem:
            first.setdefault(print_, entry.config)
    for _, entry, print_ in chosen:
        same = '' if entry.problem else first[print_]
        yield Entry(**{**vars(entry), 'same_as': '' if same == entry.config else same})


def _is_borrowed(entry: Entry) -> bool:
    own = entry.detector.lower().replace('_', '')
    return entry.folder.replace('_', '').lower() not in (own, own.removesuffix('detector'))
