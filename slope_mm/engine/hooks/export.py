"""Packed files beside the checkpoints of a run."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from slope_mm.convert import compressed_layers
from slope_mm.engine.packed import stock_config
from slope_mm.packing.writer import SMALLEST, check_options, save_packed

CHECKPOINT_SUFFIXES = ('.pth', '.pt', '.ckpt', '.tar', '.bin')


@HOOKS.register_module()
class SlopeExportHook(Hook):
    """Writes a packed file beside every checkpoint.

    Note:
        It follows the checkpoint hook: ``epoch_3.slope`` appears beside ``epoch_3.pth``, the best
        checkpoint included, and holds the very weights of that checkpoint (the averaged ones where
        EMAHook swaps them in). When the checkpoint hook removes a checkpoint of this run, its
        packed file goes too.

    Args:
        coding (str): As in ``slope_mm.save_packed``. Defaults to ``'smallest'``.
        dtype (str, optional): As in ``slope_mm.save_packed``. Defaults to None.
    """

    # CheckpointHook runs at VERY_LOW.
    priority = 'LOWEST'

    def __init__(self, coding: str = SMALLEST, dtype: str | None = None) -> None:
        check_options(coding, dtype)
        self.coding, self.dtype = coding, dtype
        self._saved: dict[str, Any] | None = None
        self._seen: dict[str, Any] = {}
        # What was written, and the checkpoint that it lies beside.
        self._written: dict[Path, Path] = {}

    def before_train(self, runner: Any) -> None:
        """Leaves checkpoints of an earlier run alone."""
        self._seen = self._named(runner)
        # Private to mmengine's Runner, which has no other word for it.
        if getattr(runner, '_resume', False):
            # Those of this run: what they lie beside may be removed from now on.
            for folder in {Path(path).parent for path, _ in self._seen.values()}:
                for packed in folder.glob('*.slope'):
                    for suffix in CHECKPOINT_SUFFIXES:
                        if (beside := packed.with_suffix(suffix)).exists():
                            self._written[packed] = beside

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Remembers what is being saved; its name is known once it is there."""
        self._saved = checkpoint

    def after_train_epoch(self, runner: Any) -> None:
        """Looks for a new checkpoint."""
        self._look(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Looks for a new checkpoint."""
        self._look(runner)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Looks for a new best checkpoint."""
        self._look(runner)

    def _look(self, runner: Any) -> None:
        saved, self._saved = self._saved, None
        if saved is None:
            return
        for key, found in self._named(runner).items():
            if found != self._seen.get(key):
                self._seen[key] = found
                if is_main_process():
                    self._export(runner, saved, Path(found[0]))

    @staticmethod
    def _named(runner: Any) -> dict[str, tuple[str, int | None]]:
        """Where the last checkpoint and the best one of each metric lie, and when they were made.

        A template without a number names them all alike.
        """
        return {
            key: (path, Path(path).stat().st_mtime_ns if Path(path).exists() else None)
            for key, path in runner.message_hub.runtime_info.items()
            if path is not None and (key == 'last_ckpt' or key.startswith('best_ckpt'))
        }

    def _export(self, runner: Any, checkpoint: dict[str, Any], beside: Path) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        saved = copy.deepcopy(model).cpu()
        saved.load_state_dict(checkpoint['state_dict'])
        for layer in compressed_layers(saved).values():
            # A checkpoint knows nothing of a ramp, and neither does who loads it.
            layer.set_pattern(layer.slope_spec.pattern)
        meta = dict(
            config=stock_config(runner.cfg),
            dataset_meta=getattr(runner.train_dataloader.dataset, 'metainfo', None),
            epoch=checkpoint['meta']['epoch'],
            iteration=checkpoint['meta']['iter'],
        )
        # A name without an ending may have dots of its own.
        name = beside.stem if beside.suffix in CHECKPOINT_SUFFIXES else beside.name
        path = beside.with_name(f'{name}.slope')
        size = save_packed(saved, path, meta, coding=self.coding, dtype=self.dtype)
        print_log(f'SLOPE: {path} has {size:,} bytes', logger='current', level=logging.INFO)
        self._written[path] = beside
        for stale in [packed for packed, made in self._written.items() if not made.exists()]:
            stale.unlink(missing_ok=True)
            del self._written[stale]
