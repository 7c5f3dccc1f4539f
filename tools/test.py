"""Evaluate a detector: mmdet's tools/test.py with SLOPE's plug-ins and checks in place."""

from __future__ import annotations

import argparse
import os

import torch
from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config

from slope_mm.convert import bake
from slope_mm.engine import launch
from slope_mm.engine.config_options import ConfigOptions
from slope_mm.engine.data_files import check_data
from slope_mm.engine.launchers import use_launcher
from slope_mm.engine.stock import is_baked, use_stock_model
from slope_mm.engine.tta import check_tta, use_tta
from slope_mm.errors import ConfigError, ExportError
from slope_mm.export import require_runtime
from slope_mm.export.detector import use_onnx_model
from slope_mm.export.semi_structured import NEEDS_CUDA, use_semi_structured

BACKENDS = ('torch', 'onnxruntime', 'semi_structured')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='test config file path')
    parser.add_argument(
        'checkpoint',
        help='training checkpoint, packed file (.slope), stock checkpoint, or folder of an export',
    )
    parser.add_argument(
        '--backend',
        choices=BACKENDS,
        default='torch',
        help='onnxruntime: CHECKPOINT is a folder of tools/export.py onnx; semi_structured: torch'
        " runs 2:4 layers with the GPU's sparse kernels",
    )
    parser.add_argument('--work-dir', help='the directory of the metrics file')
    parser.add_argument('--out', help='dump predictions to a pickle file for offline evaluation')
    parser.add_argument('--show', action='store_true', help='show prediction results')
    parser.add_argument('--show-dir', help='directory where painted images are saved')
    parser.add_argument('--wait-time', type=float, default=2, help='interval of --show in seconds')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value pairs, nested keys with dots; lists as'
        ' key="[a,b]" or key=a,b',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed passes --local-rank or, before torch 2.0, --local_rank.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def use_export(config: Config, folder: str) -> None:
    """The detector that an export runs, built once before anything is written."""
    require_runtime()
    use_onnx_model(config, folder)
    check_data(config.get('test_dataloader'), 'test_dataloader')
    launch.build_model(config)
    launch.check_work_dir(config.work_dir)
    config.load_from = None


def check_outputs(config: Config, args: argparse.Namespace) -> None:
    """Refuses flags whose outputs this config would never give.

    Raises:
        ConfigError: Names the flag.
    """
    evaluator = config.get('test_evaluator')
    if args.out is not None and isinstance(evaluator, dict) and 'dataset_prefixes' in evaluator:
        raise ConfigError(
            '--out: an evaluator of several data sets gives each metric its own part of the'
            ' predictions, and none all of them; evaluate one data set at a time'
        )
    if (args.show or args.show_dir) and not (config.get('default_hooks') or {}).get(
        'visualization'
    ):
        raise ConfigError(
            '--show and --show-dir need'
            " default_hooks=dict(visualization=dict(type='DetVisualizationHook')) in the config"
        )


def main() -> None:
    args = parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f"--out '{args.out}' has to end in .pkl or .pickle")
    setup_cache_size_limit_of_dynamo()
    if args.out is not None:
        launch.check_folder(os.path.dirname(args.out) or '.', 'folder of --out', '--out')
    config = launch.read_config(args.config, args.cfg_options)
    use_launcher(config, args.launcher)
    launch.set_work_dir(config, args.config, args.work_dir)
    check_outputs(config, args)
    if args.tta:
        check_tta(config)
    config.load_from, config.resume = args.checkpoint, False
    if args.backend == 'semi_structured' and not torch.cuda.is_available():
        raise ExportError(NEEDS_CUDA)
    if args.backend == 'onnxruntime':
        if args.launcher != 'none':
            raise ExportError(
                'exported detectors have nothing that processes could share; leave --launcher out'
            )
        use_export(config, args.checkpoint)
    else:
        if is_baked(args.checkpoint):
            use_stock_model(config)
        launch.check_before_testing(config, args.checkpoint)
    if args.show or args.show_dir:
        config = trigger_visualization_hook(config, args)
    if args.tta:
        use_tta(config)
    runner = launch.build_runner(config)
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    if args.backend == 'semi_structured':
        # Masks and kernels are made of the loaded weights.
        runner.load_or_resume()
        bake(runner.model, activations='fake_quant', inplace=True)
        names = use_semi_structured(runner.model)
        print(f'{len(names)} layers run with semi-structured kernels')
    runner.test()


if __name__ == '__main__':
    launch.run_tool(main)
