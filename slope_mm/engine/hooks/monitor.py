"""Shows what compression does to the weights while they train."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from slope_mm.analysis.metrics import LayerMetrics, layer_metrics, summary
from slope_mm.convert import compressed_layers
from slope_mm.engine.audit import audit
from slope_mm.engine.optim_wrapper import RegularizedOptimWrapper
from slope_mm.engine.storage import WholeFileBackend
from slope_mm.errors import ConfigError
from slope_mm.ops import flip_rate


@HOOKS.register_module()
class SlopeMonitorHook(Hook):
    """Logs the state of the compression, and audits it in the first iteration.

    Every ``interval`` iterations the mean and worst cosine, the mean SQNR (dB), the share of mask
    entries that flipped since the last look, the clipped share and the weighted regularizer go to
    the log and to every visualizer backend (``train/slope_*``). After each evaluation the work
    directory gains rows in ``slope_layers.csv`` and a picture ``slope_layers.png``.

    Note:
        The audit of iteration 1 raises if a layer breaks its pattern or uses more than 2^bits
        codes, and warns about layers that did not run.

    Args:
        interval (int): Iterations between two looks. Defaults to 50.
        picture (bool): Draw ``slope_layers.png``. Defaults to True.
        gradients (bool): At every look, also the norm of the regularizer's gradient relative to the
            task's, over all latent weights (``slope_gradient_ratio``); costs two backward passes
            more there. Defaults to False.
    """

    priority = 'NORMAL'

    def __init__(self, interval: int = 50, picture: bool = True, gradients: bool = False) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ConfigError(
                f'SlopeMonitorHook interval={interval!r} is not a number of iterations >= 1'
            )
        self.interval, self.picture, self.gradients = interval, picture, gradients
        self._masks: dict[str, Tensor] = {}
        self._flips: dict[str, float] = {}
        self._audited = False
        self._continues = False

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Asks for the gradients' ratio where a look will follow."""
        wrapper = runner.optim_wrapper
        if self.gradients and isinstance(wrapper, RegularizedOptimWrapper):
            wrapper.watch_gradients = not self._audited or self.every_n_train_iters(
                runner, self.interval
            )

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Audits once, then looks every ``interval`` iterations."""
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, RegularizedOptimWrapper) and wrapper.last_regularization is not None:
            # In every iteration: mmengine averages what is called a loss over its last values.
            runner.message_hub.update_scalar('train/slope_loss', wrapper.last_regularization)
        if not self._audited:
            self._audited = True
            ramped = any(getattr(hook, 'ramp_until', 0) for hook in runner.hooks)
            for warning in audit(_plain(runner.model), ramped):
                runner.logger.warning(warning)
            self._look(runner)
        elif self.every_n_train_iters(runner, self.interval):
            self._look(runner)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Writes the CSV rows and the picture."""
        layers = compressed_layers(_plain(runner.model))
        if not layers or not is_main_process():
            return
        rows = [layer_metrics(name, layer) for name, layer in layers.items()]
        table = Path(runner.work_dir) / 'slope_layers.csv'
        if not self._continues and not runner._resume and table.exists():
            # Of another run in this folder.
            table.replace(table.with_name(f'slope_layers_before_{runner.timestamp}.csv'))
        self._continues = True
        self._append_csv(table, runner, rows)
        if self.picture:
            from slope_mm.analysis.figures import draw_layers

            title = f'after {runner.iter} iterations'
            draw_layers(rows, Path(runner.work_dir) / 'slope_layers.png', title)
            draw_layers(rows, Path(runner.work_dir) / f'slope_layers_iter_{runner.iter}.png', title)

    def _look(self, runner: Any) -> None:
        layers = compressed_layers(_plain(runner.model))
        if not layers:
            return
        rows = []
        for name, layer in layers.items():
            rows.append(layer_metrics(name, layer))
            mask = layer.mask
            if mask is not None:
                if name in self._masks:
                    self._flips[name] = float(flip_rate(self._masks[name], mask))
                self._masks[name] = mask.clone()
        figures = summary(rows)
        ratio = getattr(runner.optim_wrapper, 'gradient_ratio', None)
        if self.gradients and ratio is not None:
            figures['gradient_ratio'] = float(ratio)
        if self._flips:
            figures['flip_rate'] = sum(self._flips.values()) / len(self._flips)
        for key, value in figures.items():
            runner.message_hub.update_scalar(f'train/slope_{key}', value)

    def _append_csv(self, path: Path, runner: Any, rows: list[LayerMetrics]) -> None:
        # Written anew as a whole: a run that is killed meanwhile leaves no half row.
        text = io.StringIO(path.read_bytes().decode() if path.exists() else '', newline='')
        new = not text.seek(0, io.SEEK_END)
        writer = csv.writer(text)
        if new:
            writer.writerow(['epoch', 'iter', *LayerMetrics.columns(), 'flip_rate'])
        for row in rows:
            flips = self._flips.get(row.name)
            writer.writerow(
                [runner.epoch, runner.iter, *row.values(), '' if flips is None else flips]
            )
        WholeFileBackend().put_text(text.getvalue(), path)


def _plain(model: Any) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
