"""Makes an epoch's randomness a function of the seed and the epoch alone."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seeds python, numpy and torch at the start of every epoch.

    Note:
        mmengine's checkpoints hold no random states, so a resumed run samples other proposals than
        an uninterrupted one. With this hook a run that is resumed at an epoch's end continues as if
        it had never stopped (in iteration-based training: as if it began a new epoch there).
        Data workers seed themselves from the run's seed at the start of each epoch, unless they
        are persistent.
    """

    priority = 'VERY_HIGH'
    _seed: int | None = None

    def before_run(self, runner: Any) -> None:
        """Remembers the seed that the data loader was built with."""
        self._seed = runner.seed

    def before_train(self, runner: Any) -> None:
        """Gives a resumed run's data loader the seed that its checkpoint brought.

        Without a seed in the config mmengine draws one and builds the loader with it before it
        reads the checkpoint.
        """
        if runner.seed == self._seed:
            return
        loader = runner.train_dataloader
        # One of its own, or of all ranks together, stays.
        if getattr(loader.sampler, 'seed', None) == self._seed:
            loader.sampler.seed = runner.seed
        start = loader.worker_init_fn
        if isinstance(start, functools.partial) and start.keywords.get('seed') == self._seed:
            loader.worker_init_fn = functools.partial(start, seed=runner.seed)

    def before_train_epoch(self, runner: Any) -> None:
        """Seeds with (seed, epoch, rank)."""
        # Distinct streams for neighbouring seeds and epochs, in the 32 bits that numpy takes.
        mixed = np.random.SeedSequence([int(runner.seed or 0), runner.epoch, get_rank()])
        seed = int(mixed.generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
