"""What a study is: tasks, arms, seeds, and what is drawn of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Start:
    """Where all arms of a task start from.

    Attributes:
        config: Config that trains it; None if ``checkpoint`` is given.
        checkpoint: A checkpoint that exists already (path or URL).
        options: Overrides of the config.
        per_seed: One start a seed, trained with that seed, instead of one for all.
    """

    config: str | None = None
    checkpoint: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    per_seed: bool = False


@dataclass(frozen=True)
class Task:
    """A model on a data set: what an arm is tried on.

    Attributes:
        name: Short name, also in ``results.json``.
        config: The fp32 config whose schedule all arms share.
        metrics: Name in the results -> name in the evaluator's metrics.
        start: What arms start from; None takes the config's own ``load_from``.
        options: Overrides of the config for all arms.
        seeds: Seeds of this task.
        shapes: Options of the shapes set that is made if it is missing, with its ``root``.
        title: How tables and figures call it.
    """

    name: str
    config: str
    metrics: Mapping[str, str]
    start: Start | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    shapes: Mapping[str, Any] | None = None
    title: str = ''


@dataclass(frozen=True)
class Arm:
    """One treatment.

    Attributes:
        name: As in tables.
        recipe: What is compressed; None is the fp32 arm.
        regularizer: ``optim_wrapper.regularizer``.
        schedule: Arguments of the SlopeScheduleHook.
        options: Overrides of the task's config.
        seeds: Only these of the task's seeds; None for all.
        tasks: Only these tasks; None for all.
    """

    name: str
    recipe: Mapping[str, Any] | None = None
    regularizer: Mapping[str, Any] = field(default_factory=lambda: {'type': 'none'})
    schedule: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Table:
    """A part of the results as a table.

    Attributes:
        title: Heading.
        arms: Names, in order.
        against: The arm of the paired differences.
        reference: The arm of the relative column, usually fp32; None leaves the column out.
    """

    title: str
    arms: tuple[str, ...]
    against: str
    reference: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A table of differences alone.

    Attributes:
        title: Heading.
        pairs: (arm, what it is compared with).
    """

    title: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FigureSpec:
    """A picture of the results: its kind, file name and the arms of each series.

    Attributes:
        kind: What is drawn against what.
        name: Of its file, without the task's.
        series: Label to arms.
        title: What stands above it.
        reference: Arm that is drawn as a line.
        tasks: The tasks that have it; None for all.
        labels: All labels of the study's figures: a label looks the same in each of them.
    """

    kind: str
    name: str
    series: Mapping[str, tuple[str, ...]]
    title: str = ''
    reference: str | None = None
    tasks: tuple[str, ...] | None = None
    labels: tuple[str, ...] = ()

    def look(self, label: str) -> int:
        """Which of the colours and markers a label has."""
        return (self.labels or tuple(self.series)).index(label)


@dataclass(frozen=True)
class Threshold:
    """Arms whose accuracies show whether sparsity and quantization add up (arXiv 2405.20935).

    Attributes:
        dense: Neither.
        sparse: Sparsity alone.
        quantized: Quantization alone.
        combined: Both, in any order.
    """

    dense: str
    sparse: str
    quantized: str
    combined: tuple[str, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """All of them."""
        return (self.dense, self.sparse, self.quantized, *self.combined)


@dataclass(frozen=True)
class Study:
    """A checked study file."""

    name: str
    title: str
    tasks: tuple[Task, ...]
    arms: tuple[Arm, ...]
    tables: tuple[Table | Comparison, ...]
    figures: tuple[FigureSpec, ...]
    interplay: Mapping[str, tuple[Any, ...]] | None = None
    not_run: str | None = None
    thresholds: tuple[Threshold, ...] = ()

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def seeds(self, task: Task, arm: Arm) -> tuple[int, ...]:
        """Seeds of an arm on a task."""
        if arm.tasks is not None and task.name not in arm.tasks:
            return ()
        return tuple(s for s in task.seeds if arm.seeds is None or s in arm.seeds)
