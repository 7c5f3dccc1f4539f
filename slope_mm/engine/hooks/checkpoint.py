"""mmengine's checkpoint hook, made safe against being killed at any moment."""

from __future__ import annotations

import os
from typing import Any

from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS

from slope_mm.engine.finite import check_checkpoint_finite
from slope_mm.engine.storage import POINTER, latest_checkpoint, not_written
from slope_mm.errors import StorageError
from slope_mm.wholefile import remove_partials, write_whole


def use_own_checkpoint_hook(config: Config) -> None:
    """Names the hook where a config has mmengine's class or its path, as lazy configs do.

    The name is that of :class:`SlopeCheckpointHook`.
    """
    paths = [f'{CheckpointHook.__module__}.CheckpointHook', 'mmengine.hooks.CheckpointHook']
    hooks = [*(config.get('default_hooks') or {}).values(), *(config.get('custom_hooks') or ())]
    for hook in hooks:
        if isinstance(hook, dict) and hook.get('type') in (CheckpointHook, *paths):
            hook['type'] = 'CheckpointHook'


@HOOKS.register_module(name=['CheckpointHook', 'SlopeCheckpointHook'], force=True)
class SlopeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, under its name: all arguments are the stock ones.

    Note:
        An older checkpoint that has to go (``max_keep_ckpts``, ``save_best``) goes when its
        successor is complete; the stock hook removes it first. A ``last_checkpoint`` that is cut
        off, or that names no complete checkpoint, is mended before a run resumes by it, and what a
        killed process left of a checkpoint is removed. A checkpoint of a compressed model in which
        a weight or a step is NaN or infinite is not written.
    """

    file_backend: Any

    def before_run(self, runner: Any) -> None:
        """Mends ``last_checkpoint``: mmengine looks there next, if it was told to resume."""
        # Private to mmengine's Runner, which has no other word for it.
        if not getattr(runner, '_resume', False) or getattr(runner, '_load_from', None) is not None:
            return
        if is_main_process():
            pointer = os.path.join(runner.work_dir, POINTER)
            found = latest_checkpoint(runner.work_dir, self._folder(runner))
            if found is not None:
                write_whole(pointer, found.encode())
            elif os.path.isfile(pointer):
                os.remove(pointer)
        barrier()

    def before_train(self, runner: Any) -> None:
        """Removes leftovers, and takes the removal of checkpoints into its own hands."""
        super().before_train(runner)
        if is_main_process() and '://' not in str(self.out_dir):
            for name in remove_partials(self.out_dir, '*.pth'):
                print_log(f'Removed {name}, left by a run that was killed', logger='current')
        self.file_backend = LateRemoval(self.file_backend)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Refuses a compressed model with NaN or infinity in it."""
        check_checkpoint_finite(runner, checkpoint)

    def _folder(self, runner: Any) -> str:
        # As the stock hook's before_train, which comes later.
        if self.out_dir is None or str(self.out_dir) == runner.work_dir:
            return str(runner.work_dir)
        return os.path.join(self.out_dir, os.path.basename(runner.work_dir.rstrip(os.sep)))

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        except StorageError:
            raise
        except OSError as error:
            # The pointer is the one file that does not go through the file backend.
            raise not_written(os.path.join(runner.work_dir, POINTER), error) from error
        self._remove_outdated()

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, float]) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        best = getattr(self, 'best_ckpt_path_dict', None) or {}
        kept = {self.last_ckpt, getattr(self, 'best_ckpt_path', None), *best.values()}
        self.file_backend.remove_all(but={path for path in kept if path is not None})


class LateRemoval:
    """A file backend that removes when it is told to, not when it is asked."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._outdated: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        """Remembers a file."""
        self._outdated.append((path, self._backend.remove))

    def rmtree(self, path: str) -> None:
        """Remembers a folder (DeepSpeed's checkpoints)."""
        self._outdated.append((path, self._backend.rmtree))

    def remove_all(self, but: set[str]) -> None:
        """Removes what was remembered, except paths that hold something new by now."""
        outdated, self._outdated = self._outdated, []
        for path, remove in outdated:
            if path not in but and self._backend.exists(path):
                remove(path)
