"""What the command-line tools share: flags to config, and everything that is checked beforehand.

mmengine's Runner writes into the work directory as soon as it is built, so all of a user's
mistakes that can be found are found before that.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import (
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    RUNNERS,
    init_default_scope,
)
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from slope_mm.convert import compressed_layers
from slope_mm.engine.checkpoint import BAKED, load_checkpoint_file
from slope_mm.engine.data_files import check_annotations, check_data
from slope_mm.engine.fit import check_fit
from slope_mm.engine.hooks.checkpoint import use_own_checkpoint_hook
from slope_mm.engine.mixed_precision import has_accelerator
from slope_mm.engine.model import NO_REGULARIZER
from slope_mm.engine.optim_constructor import SlopeOptimWrapperConstructor
from slope_mm.engine.packed import model_section
from slope_mm.engine.refusals import check_ways
from slope_mm.engine.storage import latest_checkpoint
from slope_mm.errors import CheckpointError, ConfigError, SlopeError

#: What mmengine reads.
CONFIG_SUFFIXES = ('.py', '.json', '.yaml', '.yml')


def run_tool(main: Callable[[], None]) -> None:
    """Runs a tool; a SlopeError ends it with one line on stderr and exit code 2."""
    try:
        main()
    except SlopeError as error:
        sys.stdout.flush()
        sys.stderr.write(f'error: {error}\n')
        raise SystemExit(2) from None


def _import_reason(error: BaseException) -> str:
    """What could not be imported; mmengine wraps what ``custom_imports`` raise, twice."""
    while str(error).startswith('Failed to import'):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_config(path: str, options: Mapping[str, Any] | None = None) -> Config:
    """Reads a config file and merges ``--cfg-options`` into it.

    Raises:
        ConfigError: If the file or one of its bases is missing or cannot be read, or an option does
            not fit into it.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no config '{path}'; give the path of a config file")
    if Path(path).suffix not in CONFIG_SUFFIXES:
        raise ConfigError(
            f"'{path}' is no config: its name ends in none of {', '.join(CONFIG_SUFFIXES)}; the"
            ' config comes first'
        )
    try:
        with warnings.catch_warnings():
            # mmengine's, for every mmdet:: base.
            warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)
            config = Config.fromfile(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"config '{path}' inherits from a file that is missing: {error}"
        ) from None
    except ImportError as error:
        raise ConfigError(
            f"config '{path}' needs a package that cannot be imported:"
            f' {_import_reason(error)}; install it, or put the folder that it lies in on PYTHONPATH'
        ) from None
    except ConfigParsingError as error:
        # Of lazy configs: a base that is not there, and the like.
        raise ConfigError(
            f"config '{path}' cannot be read: {' '.join(str(error).split())}"
        ) from None
    except SyntaxError as error:
        raise ConfigError(
            f"config '{path}' (or a base of it) cannot be read: {error.msg} in line {error.lineno};"
            ' mend it'
        ) from None
    try:
        config.merge_from_dict(dict(options or {}))
    except (LookupError, TypeError, AttributeError, AssertionError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--cfg-options {' '.join(options or {})}: an option does not fit into '{path}'"
            f' ({reason}); look at the config with its bases'
        ) from None
    return config


def set_work_dir(config: Config, path: str, work_dir: str | None) -> None:
    """Chooses the work directory: the flag, the config's own, or ``work_dirs/<config name>``."""
    if work_dir is not None:
        config.work_dir = work_dir
    elif config.get('work_dir') is None:
        config.work_dir = str(Path('work_dirs') / Path(path).stem)


def use_amp(config: Config) -> None:
    """``--amp``: mixed precision, bf16 where there is no GPU; the regularizer stays in fp32."""
    kind = str(config.optim_wrapper.get('type', 'OptimWrapper'))
    if kind.rsplit('.', 1)[-1].startswith('Slope'):
        config.optim_wrapper.type = 'slope_mm.SlopeAmpOptimWrapper'
    elif has_accelerator() or 'regularizer' in config.optim_wrapper:
        # SLOPE's constructor makes it one that also works without a GPU.
        config.optim_wrapper.type = 'AmpOptimWrapper'
    else:
        config.optim_wrapper.type = 'slope_mm.MixedPrecisionOptimWrapper'
    config.optim_wrapper.loss_scale = 'dynamic'


def use_auto_scale_lr(config: Config) -> None:
    """``--auto-scale-lr``: scales the learning rate to the batch size.

    Raises:
        ConfigError: If the config does not say which batch size its learning rate is for.
    """
    if 'base_batch_size' not in config.get('auto_scale_lr', {}):
        raise ConfigError(
            '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=…) in the config'
        )
    config.auto_scale_lr.enable = True


def use_resume(config: Config, resume: str | None) -> None:
    """``--resume [auto|PATH]``: continues a run.

    ``auto`` takes the newest complete checkpoint of the work directory; where there is none yet,
    training starts as it would without the flag.
    """
    if resume is None:
        return
    if resume != 'auto':
        config.resume, config.load_from = True, resume
        return
    latest = latest_checkpoint(config.work_dir, _checkpoint_folder(config))
    if latest is not None:
        config.resume, config.load_from = True, latest


def _checkpoint_folder(config: Config) -> str:
    hook = (config.get('default_hooks') or {}).get('checkpoint') or {}
    if hook.get('out_dir') is None:
        return str(config.work_dir)
    return os.path.join(hook['out_dir'], os.path.basename(config.work_dir.rstrip(os.sep)))


def build_runner(config: Config) -> Runner:
    """Builds the runner that the config asks for."""
    use_own_checkpoint_hook(config)
    if 'runner_type' in config:
        return RUNNERS.build(config)
    return Runner.from_cfg(config)


def check_before_training(config: Config) -> None:
    """Refuses what would fail later, before anything is written.

    Raises:
        SlopeError: For a work directory that cannot be written or that holds the checkpoint that
            the run starts from, missing data, a model or recipe
            that cannot be built, an optim wrapper without a regularizer, or a checkpoint that is
            missing or belongs to another model.
    """
    for loader in ('train_dataloader', 'val_dataloader'):
        check_data(config.get(loader), loader)
    check_annotations(config.get('val_evaluator'), 'val_evaluator')
    model = build_model(config)
    check_ways(config, model)
    if compressed_layers(model):
        check_optim_wrapper(config.get('optim_wrapper', {}))
    if config.get('load_from'):
        if config.get('resume') and str(config.load_from).endswith('.slope'):
            raise CheckpointError(
                f"'{config.load_from}' is a packed file, which holds no optimizer to resume with;"
                ' start from it with --cfg-options load_from=… instead'
            )
        check_checkpoint(model, config.load_from, complete=bool(config.get('resume')))
        if not config.get('resume'):
            _check_start_is_kept(config.load_from, config.work_dir)
    check_work_dir(config.work_dir)


def _check_start_is_kept(load_from: str, work_dir: str) -> None:
    start = Path(load_from).expanduser()
    if start.exists() and start.resolve().parent == Path(work_dir).resolve():
        raise ConfigError(
            f"load_from='{load_from}' lies in this run's own work directory '{work_dir}', where it"
            ' and its neighbours would be written over or removed; choose another one with'
            ' --work-dir'
        )


def warn_without_start(runner: Runner) -> None:
    """Logs a warning where a compressed detector would learn everything from the first iteration.

    Compression is fine-tuning; a stock config leaves ``load_from`` empty, and what inherits it too.
    """
    config = runner.cfg
    starts = config.get('load_from') or config.get('resume') or config.model.get('init_cfg')
    if starts or not compressed_layers(runner.model):
        return
    runner.logger.warning(
        'SLOPE: load_from is empty, so that this model trains compressed from the first iteration,'
        ' on its backbone weights at best; to compress a trained detector, set'
        " load_from='its_checkpoint.pth'"
    )


def check_before_testing(config: Config, checkpoint: str) -> None:
    """The same for an evaluation; the checkpoint has to fit completely.

    Raises:
        SlopeError: As :func:`check_before_training`.
    """
    check_data(config.get('test_dataloader'), 'test_dataloader')
    check_annotations(config.get('test_evaluator'), 'test_evaluator')
    check_checkpoint(build_model(config), checkpoint, complete=True)
    check_work_dir(config.work_dir)


def build_model(config: Config) -> nn.Module:
    """Builds the config's model without loading weights.

    Raises:
        SlopeError: If the model section or its recipe is invalid.
    """
    scope = config.get('default_scope') or 'mmdet'
    check_scope(scope)
    init_default_scope(scope)
    if 'type' not in config.get('model', {}):
        raise ConfigError("the config has no model with a 'type'; inherit from a detector's config")
    # A copy: stock detectors write into the config that they are built from.
    return MODELS.build(model_section(config))


def check_scope(scope: str) -> None:
    """Imports the package that a config takes its types from.

    Raises:
        ConfigError: If it is missing or cannot be imported.
    """
    # mmpretrain meets torchvision in its models alone.
    for name in (scope, f'{scope}.models'):
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            own = name != scope or scope in MODELS.children
            if own and getattr(error, 'name', None) == name:
                # A project's own registry, or a package without such a part.
                continue
            # RuntimeError: a torchvision built for another torch (docs/classification.md).
            raise ConfigError(
                f"the config's default_scope is '{scope}', and this package cannot be imported:"
                f' {str(error).splitlines()[0]}; install it, or mend what it needs'
            ) from None


def check_optim_wrapper(settings: Mapping[str, Any]) -> None:
    """Asks for a regularizer; what mmengine's own constructor makes of its own wrappers has none.

    Raises:
        SlopeError: If it is missing or invalid.
    """
    given = dict(settings)
    constructor = given.pop('constructor', 'DefaultOptimWrapperConstructor')
    if isinstance(constructor, str):
        constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(constructor)
    kind = given.get('type', 'OptimWrapper')
    if isinstance(kind, str):
        kind = OPTIM_WRAPPERS.get(kind)
    if constructor is SlopeOptimWrapperConstructor:
        SlopeOptimWrapperConstructor(given)
    elif constructor is DefaultOptimWrapperConstructor and kind in (OptimWrapper, AmpOptimWrapper):
        raise ConfigError(NO_REGULARIZER)


def check_work_dir(path: str) -> None:
    """Makes the work directory and tries to write into it.

    Raises:
        ConfigError: If that is impossible.
    """
    check_folder(path, 'work directory', '--work-dir')


def check_folder(path: str, what: str, flag: str) -> None:
    """Makes a folder and tries to write into it.

    Args:
        path: The folder.
        what: What messages call it.
        flag: The command line's name for it.

    Raises:
        ConfigError: If that is impossible.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"the {what} '{path}' cannot be written ({error.strerror}); choose another one"
            f' with {flag}'
        ) from None


def check_checkpoint(model: nn.Module, path: str, *, complete: bool) -> None:
    """Reads a local checkpoint and asks whether it belongs to the model.

    Raises:
        CheckpointError: If it is missing, unreadable, unsafe, or another model's or recipe's.
    """
    if '://' in path:
        return
    path = os.path.expanduser(path)
    if not Path(path).exists():
        raise CheckpointError(
            f"there is no checkpoint '{path}'; give the path of a checkpoint file"
        )
    loaded = load_checkpoint_file(path)
    state = loaded.get('state_dict', loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"'{path}' holds no state dict; give a checkpoint of a detector")
    check_fit(model, _for_student_and_teacher(model, state), complete=complete)
    if not complete or not compressed_layers(model):
        return
    meta = loaded.get('meta')
    if isinstance(meta, Mapping) and BAKED in meta:
        raise CheckpointError(
            f"'{path}' holds compressed weights of the stock model (tools/export.py stock), which"
            ' would be compressed once more, with steps that were not learned; give the checkpoint'
            ' that it was made of'
        )
    if not any(key.endswith('.slope_layer') for key in state):
        warnings.warn(
            f"'{path}' is the checkpoint of a dense model: its weights are compressed as they are,"
            ' which no training has prepared them for',
            stacklevel=2,
        )


def _for_student_and_teacher(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """As mmdet's semi-supervised detectors load a plain detector: into both of theirs."""
    parts = ('student', 'teacher')
    if not all(isinstance(getattr(model, part, None), nn.Module) for part in parts):
        return state
    if any(part in key for key in state for part in parts):
        return state
    return {f'{part}.{key}': value for key, value in state.items() for part in parts}


def load_weights(model: nn.Module, path: str) -> dict[str, Any]:
    """Loads a checkpoint that has to fit completely, for evaluation.

    Returns:
        The checkpoint's ``meta``.

    Raises:
        CheckpointError: If it does not.
    """
    check_checkpoint(model, path, complete=True)
    checkpoint = load_checkpoint(model, path, map_location='cpu')
    return dict(checkpoint.get('meta') or {})
