"""Whole detectors: exported, gated, and run by stock mmdet on ONNX Runtime sessions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exported
import onnx
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

import slope_mm
from slope_mm import ExportError
from slope_mm.export import gate, writer
from slope_mm.export.detector import use_onnx_model
from slope_mm.export.folder import INDEX, read_index, staged
from slope_mm.export.gate import judge_metrics
from slope_mm.export.images import image_batches
from slope_mm.export.nodes import FLOAT_OPERATORS
from slope_mm.export.parts import detector_parts
from slope_mm.export.runtime import OnnxPart
from slope_mm.export.skeleton import trace
from slope_mm.export.writer import export_onnx


def onnx_detector(config: Config, folder: Path) -> nn.Module:
    config = Config(config.to_dict())
    use_onnx_model(config, str(folder), threads=1)
    return MODELS.build(config.model)


@pytest.fixture(scope='module')
def batches(slope_run: tiny.Run) -> list[dict[str, Any]]:
    return image_batches(slope_run.config, 2)


@pytest.fixture
def mask_rcnn(slope_run: tiny.Run) -> nn.Module:
    return slope_run.model.cpu().eval()


@pytest.mark.parametrize(
    ('make', 'parts'),
    [
        (copy.deepcopy, ['dense', 'roi_head.bbox_head', 'roi_head.mask_head']),
        (exported.faster_rcnn, ['dense', 'roi_head.bbox_head']),
        (exported.retinanet, ['dense']),
    ],
    ids=['mask_rcnn', 'faster_rcnn', 'retinanet'],
)
def test_detectors_predict_what_pytorch_predicts(
    make: Callable[[Config], Config],
    parts: list[str],
    slope_run: tiny.Run,
    batches: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = make(slope_run.config)
    if 'roi_head' in config.model:
        config.model.test_cfg.rcnn.score_thr = 0.0
    model = exported.calibrated(config)
    if config.model.arch == 'MaskRCNN':
        model.load_state_dict(slope_run.model.state_dict())
    index = export_onnx(model, tmp_path / 'out', batches)
    assert sorted(part.name for part in index.parts) == parts
    # RoIs are handed over a few at a time where a head is made of convolutions.
    assert [p.name for p in index.parts if p.at_once] == [p for p in parts if 'mask' in p]
    detector = onnx_detector(config, tmp_path / 'out')
    assert type(detector).__name__ == config.model.arch
    assert not list(detector.parameters())
    for batch in batches:
        (expected,), (found,) = (exported.predictions(m, batch) for m in (model, detector))
        assert len(expected['scores'])
        assert torch.equal(found['labels'], expected['labels'])
        assert torch.allclose(found['scores'], expected['scores'], atol=1e-4)
        assert torch.allclose(found['bboxes'], expected['bboxes'], atol=1e-2)
        if 'masks' in expected:
            assert (found['masks'] == expected['masks']).float().mean() > 0.999
    facts = index.facts['gate']
    assert sum(facts[part]['input_codes_compared'] for part in parts) > 0
    for part in parts:
        floats = set(facts[part]['operators']).intersection(FLOAT_OPERATORS)
        assert not floats, f'{part} computes {floats} in floats'
    # The convolutions within residual blocks, and those of stacked heads, go from codes to codes.
    assert facts['dense']['operators']['QLinearConv'] >= 5


def test_rois_in_pieces_give_what_all_of_them_give(
    mask_rcnn: nn.Module, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    index = export_onnx(mask_rcnn, tmp_path / 'out', batches)
    files = index.part('roi_head.mask_head')
    part = OnnxPart.load(tmp_path / 'out', files, threads=1)
    assert part.at_once == 4
    (features, *_) = writer.capture_inputs(mask_rcnn, batches[0])['roi_head.mask_head']
    # Not contiguous, as a view of a larger batch may be.
    x = torch.cat([features] * 11)[:11].transpose(2, 3).contiguous().transpose(2, 3)
    for rois in (1, 4, 5, 11):
        part.at_once = 4
        found = part(x[:rois])
        part.at_once = None
        assert len(found) == rois and torch.equal(found, part(x[:rois]))


def test_other_configs_and_detectors_are_refused(
    mask_rcnn: nn.Module, slope_run: tiny.Run, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    export_onnx(mask_rcnn, tmp_path / 'out', batches)
    with pytest.raises(ExportError, match='give the config that it was exported with'):
        onnx_detector(exported.retinanet(slope_run.config), tmp_path / 'out')
    config = Config(dict(model=dict(type='slope_mm.OnnxDetector', folder=str(tmp_path), arch='X')))
    with pytest.raises(ExportError, match=r"there is no '.*detector\.json'"):
        MODELS.build(config.model)
    with pytest.raises(ExportError, match='neither a single-stage nor a two-stage'):
        detector_parts(nn.Conv2d(1, 1, 1))
    mask_rcnn.extra = nn.Linear(2, 2)
    with pytest.raises(ExportError, match=r"'extra\.weight' belongs to no part"):
        detector_parts(mask_rcnn)
    del mask_rcnn.extra


@pytest.mark.parametrize(
    'change',
    [
        lambda model: model.update(arch='mmdet.CascadeRCNN'),
        lambda model: model.roi_head.bbox_head.update(num_classes=7),
        lambda model: model.data_preprocessor.update(mean=[0.0, 0.0, 0.0]),
    ],
    ids=['arch', 'classes', 'pixels'],
)
def test_a_config_of_the_same_parts_is_not_taken_for_the_exported_one(
    change: Callable[[Any], None],
    mask_rcnn: nn.Module,
    slope_run: tiny.Run,
    batches: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    export_onnx(mask_rcnn, tmp_path / 'out', batches)
    config = copy.deepcopy(slope_run.config)
    # What is done with predictions may differ.
    config.model.test_cfg.rcnn.score_thr = 0.3
    assert onnx_detector(config, tmp_path / 'out').test_cfg.rcnn.score_thr == 0.3
    change(config.model)
    with pytest.raises(ExportError, match='is the export of another MaskRCNN than the config'):
        onnx_detector(config, tmp_path / 'out')


class Unheaded(nn.Module):
    """A head that only predicts and learns, as Cascade RPN's."""


@pytest.mark.parametrize('head', [None, Unheaded()])
def test_a_detector_without_a_dense_head_is_refused(
    head: nn.Module | None, mask_rcnn: nn.Module, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    other = copy.deepcopy(mask_rcnn)
    del other.rpn_head
    if head is not None:
        other.rpn_head = head
    with pytest.raises(ExportError, match='has no rpn_head.*write a packed file'):
        export_onnx(other, tmp_path / 'out', batches)


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / 'model.slope').write_bytes(b'x')
    with pytest.raises(ExportError, match='model.slope.* is a file; give the folder'):
        read_index(tmp_path / 'model.slope')


def test_damage_is_found(
    mask_rcnn: nn.Module, slope_run: tiny.Run, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / 'out'
    export_onnx(mask_rcnn, folder, batches)
    content = bytearray((folder / 'dense.onnx').read_bytes())
    content[len(content) // 2] ^= 1
    (folder / 'dense.onnx').write_bytes(content)
    with pytest.raises(ExportError, match=r"dense\.onnx' is damaged"):
        read_index(folder)
    (folder / 'dense.onnx').unlink()
    with pytest.raises(ExportError, match=r"dense\.onnx' is missing"):
        read_index(folder)
    index = json.loads((folder / INDEX).read_text())
    for name, sums in (('../dense.onnx', None), ('dense.onnx', {})):
        part = {**index['parts'][0], 'portable': name}
        part['sha256'] = part['sha256'] if sums is None else sums
        (folder / INDEX).write_text(json.dumps({**index, 'parts': [part]}))
        with pytest.raises(ExportError, match='which is no file of an export'):
            read_index(folder)
    (folder / INDEX).write_text(json.dumps({**index, 'version': 99}))
    with pytest.raises(ExportError, match='is of version 99'):
        read_index(folder)
    (folder / INDEX).write_text('{"format": 1')
    with pytest.raises(ExportError, match='cannot be read'):
        read_index(folder)


# --- the gate ------------------------------------------------------------------------------------


def tampered(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Lets a mistake slip into the portable graph, after which all goes on as usual."""
    right = writer.lower

    def wrong(*args: Any) -> Any:
        model, calls = right(*args)
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        change(stored)
        return model, calls

    monkeypatch.setattr(writer, 'lower', wrong)


def set_value(tensor: onnx.TensorProto, place: int, value: Any) -> None:
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[place] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


@pytest.mark.parametrize(
    ('name', 'place', 'value', 'message'),
    [
        ('backbone.layer2.0.conv1.weight.codes', 5, 100, '1 weight codes'),
        ('backbone.layer2.0.conv1.input.scale', 0, 0.5, r'[1-9]\d* of \d+ input codes'),
        ('backbone.layer2.0.conv1.bias', 1, 50.0, 'output by'),
    ],
)
def test_a_wrong_number_is_refused_by_the_layers_name(
    name: str,
    place: int,
    value: Any,
    message: str,
    mask_rcnn: nn.Module,
    batches: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(stored: dict[str, Any]) -> None:
        if name in stored:
            set_value(stored[name], place, value)

    tampered(monkeypatch, change)
    with pytest.raises(ExportError, match=message) as error:
        export_onnx(mask_rcnn, tmp_path / 'out', batches)
    assert "'backbone.layer2.0.conv1' differs most" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_metrics_further_apart_than_a_thousandth_are_refused(
    mask_rcnn: nn.Module, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    def judge(folder: Path) -> dict[str, Any]:
        assert read_index(folder).arch == 'MaskRCNN'
        judge_metrics({'coco/bbox_mAP': 0.5}, {'coco/bbox_mAP': 0.5011})
        return {}

    with pytest.raises(ExportError, match=r'coco/bbox_mAP 0\.5011, the checkpoint 0\.5000'):
        export_onnx(mask_rcnn, tmp_path / 'out', batches, judge=judge)
    assert not list(tmp_path.iterdir())
    judge_metrics({'coco/bbox_mAP': 0.5}, {'coco/bbox_mAP': 0.501})


@pytest.mark.parametrize('metrics', [{}, {'data_time': 0.1}, {'coco/AR@100': 0.5}])
def test_an_evaluation_that_gives_nothing_to_compare_is_refused(metrics: dict[str, float]) -> None:
    with pytest.raises(ExportError, match='gives no mAP to compare'):
        judge_metrics(metrics, metrics)


def test_lvis_has_another_name_for_it() -> None:
    with pytest.raises(ExportError, match=r'lvis/bbox_AP 0\.1000, the checkpoint 0\.4000'):
        judge_metrics({'lvis/bbox_AP': 0.4}, {'lvis/bbox_AP': 0.1})
    # An export that detects nothing has no metrics at all.
    with pytest.raises(ExportError, match=r'coco/bbox_mAP 0\.0000, the checkpoint 0\.4000'):
        judge_metrics({'coco/bbox_mAP': 0.4}, {})


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    mask_rcnn: nn.Module, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('important')
    with pytest.raises(ExportError, match='exists and is no earlier export'):
        export_onnx(mask_rcnn, tmp_path / 'mine', batches)
    assert (tmp_path / 'mine' / 'thesis.txt').read_text() == 'important'
    (tmp_path / 'link').symlink_to('out')
    (tmp_path / 'out').mkdir()
    for name in ('out', 'link'):
        export_onnx(mask_rcnn, tmp_path / name, batches)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['link', 'mine', 'out']
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'out' / INDEX).is_file()
    # Results that were written beside an export are not its own.
    (tmp_path / 'out' / 'results.pkl').write_bytes(b'hours')
    with pytest.raises(ExportError, match=r"holds 'results\.pkl' beside an earlier export"):
        export_onnx(mask_rcnn, tmp_path / 'out', batches)
    assert (tmp_path / 'out' / 'results.pkl').read_bytes() == b'hours'


@pytest.mark.parametrize('before', ['nothing', 'an empty folder'])
def test_what_came_into_the_folder_meanwhile_is_not_lost(before: str, tmp_path: Path) -> None:
    target = tmp_path / 'out'
    if before != 'nothing':
        target.mkdir()
    with pytest.raises(ExportError, match='exists and is no earlier export'), staged(target) as new:
        (new / INDEX).write_text('{}')
        target.mkdir(exist_ok=True)
        (target / 'notes.txt').write_text('hours')
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert (target / 'notes.txt').read_text() == 'hours'


def test_the_folder_one_works_in_is_not_replaced(
    mask_rcnn: nn.Module,
    batches: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match='is the folder you are in'):
        export_onnx(mask_rcnn, '.', batches)
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob(f'.{tmp_path.name}.*'))


def test_uncalibrated_inputs_are_refused(
    slope_run: tiny.Run, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = tiny.build(slope_run.config).eval()
    with pytest.raises(ExportError, match='input quantizers have no range yet'):
        export_onnx(model, tmp_path / 'out', batches)


def test_a_layer_that_never_runs_needs_no_range(
    mask_rcnn: nn.Module, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    model: Any = copy.deepcopy(mask_rcnn)
    spare = copy.deepcopy(model.backbone.layer2[0].conv1)
    spare.slope_act_signed.fill_(-1)
    spare._act_states = [-1]
    assert not spare.calibrated
    model.backbone.spare = spare
    export_onnx(model, tmp_path / 'out', batches)
    assert (tmp_path / 'out' / 'detector.json').is_file()


def test_the_gate_tolerates_what_pytorch_itself_is_unsure_of(
    mask_rcnn: nn.Module, batches: list[dict[str, Any]]
) -> None:
    inputs = writer.capture_inputs(mask_rcnn, batches[0])
    (part, *_) = writer.export_parts(mask_rcnn, inputs)
    module = detector_parts(mask_rcnn)[0].module
    report = gate.check_part(
        part.name, part.portable, part.cpu, part.calls, mask_rcnn, module, inputs['dense']
    )
    assert report.passes and report.tolerance == gate.QUANTIZED_TOLERANCE
    assert {la.name for la in report.layers} <= set(slope_mm.compressed_layers(mask_rcnn))
    assert all(la.codes == la.weights == 0 and la.inputs > 0 for la in report.layers)


class OnTheBorder(nn.Module):
    """Integers in, and halves behind the first layer: a last bit decides how they are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.round()).round()


def test_noise_arises_at_every_layer() -> None:
    """In the images alone it would end at the first quantizer, and a good export be refused."""
    part, x = OnTheBorder(), torch.full((1, 1, 8, 8), 5.0)
    assert torch.equal(part(x * (1 + gate.NOISE * torch.randn(x.shape))), part(x))
    assert gate._own_noise(part, x) > 0.1


class FixedSize(nn.Module):
    """A part with a number in it that the trace takes from its example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height = int(x.shape[2])
        return x[:, :, : height // 2] * height


@pytest.mark.parametrize('size', [64, 128])
def test_a_size_that_the_trace_fixed_is_found_at_any_size(size: int) -> None:
    part = FixedSize()
    example = torch.randn(1, 3, size, size)
    graph = trace(part, example, 'images', ['y'], {0: 'batch', 2: 'height', 3: 'width'})
    report = gate.check_part('dense', graph, graph, [], part, part, [example], size_step=32)
    assert not report.passes and report.layers_pass
    with pytest.raises(ExportError, match=f'for an input of 2x3x{size + 32}x{size + 64}'):
        gate.refuse([report])
