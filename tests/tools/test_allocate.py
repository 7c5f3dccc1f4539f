"""tools/allocate.py: the config it writes, the file that comes of it, and what it refuses."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmengine.config import Config

import slope_mm
from slope_mm.engine import launch

FAST = ['--bits', 2, 4, '--patterns', 'dense', '2:4', '--batches', 1]


def call(tool: str, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a tool."""
    errors, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        code = tiny.call_tool(tool, *arguments)
    return code, printed.getvalue(), errors.getvalue()


@pytest.fixture(scope='module')
def config_file(
    tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp('allocate')
    config = tiny_config(folder, 'mask_rcnn_r18_shapes_slope_w4a4', validate=False)
    config.model.recipe.rules = [dict(match='neck', weight=dict(sparsity=None, bits=5))]
    return tiny.dump(config, folder / 'base.py')


def test_the_written_config_trains_and_its_file_keeps_the_budget(
    config_file: Path, dense_run: tiny.Run, tmp_path: Path
) -> None:
    out, budget = tmp_path / 'allocated.py', 120_000
    code, printed, errors = call(
        'allocate', config_file, dense_run.checkpoint, '--size', '120kB', *FAST, '-o', out
    )
    assert code == 0, errors
    assert 'Allocated: total error' in printed and 'Uniform, ' in printed
    config = Config.fromfile(out)
    assert config.load_from == str(dense_run.checkpoint)
    specs = {
        name: str(layer.slope_spec)
        for name, layer in slope_mm.compressed_layers(launch.build_model(config)).items()
    }
    free = {spec for name, spec in specs.items() if name.startswith('backbone.layer')}
    assert len(free) > 1
    assert free <= {'dense W2 A4', 'dense W4 A4', '2:4 W2 A4', '2:4 W4 A4'}
    # The rules of the base and the default ones stand.
    assert {spec for name, spec in specs.items() if name.startswith('neck')} == {'dense W5 A4'}
    assert specs['backbone.conv1'] == 'dense W8 A8'

    code, _, errors = call('train', out, '--work-dir', tmp_path / 'run')
    assert code == 0, errors
    trained = (tmp_path / 'run' / 'last_checkpoint').read_text()
    sizes = {}
    for coding in ('enumerative', 'smallest'):
        packed = tmp_path / f'{coding}.slope'
        code, _, errors = call('export', 'packed', out, trained, packed, '--coding', coding)
        assert code == 0, errors
        sizes[coding] = packed.stat().st_size
    promised = int(printed.split('packed file at most ')[1].split(' bytes')[0].replace(',', ''))
    # Training changes the decimal digits of steps and counters in the header, nothing else.
    assert abs(sizes['enumerative'] - promised) < 0.005 * budget
    assert 0.97 * budget < promised <= budget
    assert sizes['smallest'] <= sizes['enumerative']


@torch.no_grad()
def test_bit_operations_of_the_first_test_image(
    config_file: Path, dense_run: tiny.Run, tmp_path: Path
) -> None:
    out, arguments = tmp_path / 'allocated.py', ['--measure', 'sqnr', *FAST]
    code, printed, errors = call(
        'allocate', config_file, dense_run.checkpoint, '--bops', '700M', *arguments, '-o', out
    )
    assert code == 0, errors
    told = float(printed.split('bytes (')[1].split('weights), ')[1].split(' GBOPs')[0])
    config = Config.fromfile(out)
    model: Any = launch.build_model(config).eval()
    # Proposals, and with them the operations of the heads, are those of the dense weights.
    dense = tiny.build(dense_run.config).eval()
    launch.load_weights(dense, str(dense_run.checkpoint))
    batch = tiny.first_batch(config, 1, 'test')
    total = 0.0
    for name, layer in slope_mm.compressed_layers(model).items():
        spec = layer.slope_spec
        density = 1 if spec.pattern is None else spec.pattern.density
        macs = _macs_of(dense, dense.get_submodule(name), batch)
        total += macs * density * spec.bits * spec.activation_bits
    assert told <= 0.7
    assert told == pytest.approx(total / 1e9, abs=6e-4)


def _macs_of(model: Any, layer: torch.nn.Module, batch: Any) -> int:
    """By the output's size and the weight's, as one would count by hand."""
    count = 0

    def add(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal count
        if isinstance(module, torch.nn.ConvTranspose2d):
            count += inputs[0].numel() * module.weight[0].numel()
        else:
            count += output.numel() * module.weight[0].numel()

    handle = layer.register_forward_hook(add)
    model.test_step(batch)
    handle.remove()
    return count


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--size', '1kB', '--measure', 'sqnr'], ['cannot be met', 'smallest', 'largest']),
        (['--bops', '1'], ['cannot be met', 'bit operations']),
        ([], ['there is no budget', '--size']),
        (['--size', 'much'], ["'much' is not a size"]),
        (['--size', '120kB', '--batches', '0'], ['--batches 0']),
        (['--size', '120kB', '--patterns', '4:2'], ["'4:2'", "did you mean '2:4'"]),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    config_file: Path, dense_run: tiny.Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    out = tmp_path / 'new' / 'out.py'
    given = [*FAST, '--measure', 'sqnr', *arguments]
    code, _, errors = call('allocate', config_file, dense_run.checkpoint, *given, '-o', out)
    assert code == 2
    line = errors.splitlines()[-1]
    assert line.startswith('error: ')
    assert all(word in line for word in words), line
    assert not out.parent.exists()


def test_other_inputs_are_refused(
    config_file: Path, dense_run: tiny.Run, slope_run: tiny.Run, tmp_path: Path
) -> None:
    out = tmp_path / 'out.py'
    for config, checkpoint, words in (
        (config_file, slope_run.checkpoint, 'compressed model already'),
        (config_file, tmp_path / 'nowhere.pth', 'there is no checkpoint'),
        (dense_run.file, dense_run.checkpoint, 'the config has no recipe'),
    ):
        code, _, errors = call('allocate', config, checkpoint, '--size', '120kB', '-o', out)
        assert code == 2 and words in errors
        assert not out.exists()
    out.write_text('mine')
    code, _, errors = call('allocate', config_file, dense_run.checkpoint, '--size', '1', '-o', out)
    assert code == 2 and '--force' in errors and out.read_text() == 'mine'


@pytest.mark.parametrize('loader', ['train_dataloader', 'test_dataloader'])
def test_images_that_are_not_there_are_named(
    loader: str, tiny_config: Callable[..., Config], dense_run: tiny.Run, tmp_path: Path
) -> None:
    """Weights are judged without images; ranges of inputs and bit operations are not."""
    config = tiny_config(tmp_path, 'mask_rcnn_r18_shapes_slope_w4a4', validate=False)
    config[loader].dataset.data_root = 'nowhere/shapes'
    file, out = tiny.dump(config, tmp_path / 'config.py'), tmp_path / 'out.py'
    given = ['--measure', 'sqnr', '--bops', '1G', *FAST]
    code, _, errors = call('allocate', file, dense_run.checkpoint, *given, '-o', out)
    assert code == 2 and not out.exists()
    assert f"error: {loader}: there is no 'nowhere/shapes" in errors.splitlines()[-1]
