"""Runs the zoo: a process with limits for each config, results as lines that a later run skips."""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mmdet
import torch

from slope_mm.errors import ConfigError
from slope_mm.zoo.catalogue import RELATIVES, Entry, catalogue, one_line, relatives
from slope_mm.zoo.configs import stock_zoo_config
from slope_mm.zoo.page import OUT_OF_MEMORY
from slope_mm.zoo.trial import DenseFailure, peak_mb, try_config

Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a run of the zoo does.

    Attributes:
        results: File of results, one JSON object a line; what it holds already is not run again.
        log: Where the trials' own output goes.
        part: ``(i, n)``: every n-th config, from the i-th on (1 to n).
        only: Patterns of config paths; empty: all.
        memory_gb: A trial that wants more is refused memory by the system.
        seconds: A trial that takes longer is stopped.
        again: Run what has a result already too.
    """

    results: Path
    log: Path
    part: tuple[int, int] = (1, 1)
    only: tuple[str, ...] = ()
    memory_gb: float = 8.0
    seconds: float = 900.0
    again: bool = False


def parse_part(text: str) -> tuple[int, int]:
    """Reads ``i/n``.

    Raises:
        ConfigError: If it is no part of a whole.
    """
    number, _, of = text.partition('/')
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise ConfigError(f'--part {text!r} is no part; write 2/4 for the second of four')
    return int(number), int(of)


def select(entries: Iterable[Entry], options: Options) -> list[Entry]:
    """The entries that a run is about.

    Raises:
        ConfigError: If the patterns match nothing.
    """
    chosen = list(entries)
    if options.only:
        chosen = [
            entry
            for entry in chosen
            if any(fnmatch.fnmatch(entry.config, f'*{pattern}*') for pattern in options.only)
        ]
        if not chosen:
            raise ConfigError(
                f'--only {" ".join(options.only)} matches no config of the zoo; --list prints them'
            )
    number, of = options.part
    return chosen[number - 1 :: of]


def read_results(path: Path) -> dict[str, Result]:
    """The last result of each config; a line that is half written is passed over."""
    results: dict[str, Result] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[result['config']] = result
    return results


def listed(options: Options) -> list[Entry]:
    """The catalogue, mmdet's part from the run's folder where it was listed before.

    Reading 800 configs takes longer than trying one.
    """
    kept = options.results.with_name('catalogue.json')
    version = mmdet.__version__
    if kept.is_file():
        try:
            content = json.loads(kept.read_text())
        except ValueError:
            # Cut off while it was written: it is listed once more.
            content = {'mmdet': None}
        if content['mmdet'] == version:
            return [*(Entry(**entry) for entry in content['entries']), *relatives()]
    entries = catalogue()
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({'mmdet': version, 'entries': [vars(e) for e in entries]}, indent=1))
    return [*entries, *relatives()]


def widest_first(entries: Iterable[Entry]) -> list[Entry]:
    """New detector classes first, then new pairs of detector and backbone, then the rest."""
    entries = list(entries)
    detectors: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    ranks = {}
    for entry in entries:
        pair = (entry.detector, entry.backbone)
        ranks[entry] = (entry.detector in detectors) + (pair in pairs)
        if not entry.same_as:
            detectors.add(entry.detector)
            pairs.add(pair)
    return sorted(entries, key=lambda entry: ranks[entry])


def run_zoo(options: Options, say: Callable[[str], None] = print) -> dict[str, Result]:
    """Tries all selected configs that have no result yet.

    Returns:
        All results by config.
    """
    entries = listed(options)
    # A packed file of each detector class is enough, and of each relative.
    packs = {e.detector: e.config for e in reversed(entries) if not (e.same_as or e.problem)}
    done = {} if options.again else read_results(options.results)
    # What a limit stopped is tried again under a larger one.
    done = {name: row for name, row in done.items() if not _was_tighter(row, options)}
    todo = [e for e in widest_first(select(entries, options)) if e.config not in done]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    if options.results.is_file() and not options.results.read_text().endswith('\n'):
        with options.results.open('a', encoding='utf-8') as file:
            file.write('\n')
    for number, entry in enumerate(todo, 1):
        pack = packs.get(entry.detector) == entry.config or entry.config in RELATIVES
        result = run_entry(entry, options, pack)
        with options.results.open('a', encoding='utf-8') as file:
            file.write(json.dumps(result) + '\n')
        said = result.get('reason') or f'{result.get("compressed", 0):.2%} compressed'
        say(f'[{number}/{len(todo)}] {entry.config}: {result["status"]}, {said}')
    return read_results(options.results)


def _was_tighter(row: Result, options: Options) -> bool:
    """Whether a result is that of a limit, which is larger now."""
    limits = row.get('limited') or {}
    return (
        limits.get('seconds', math.inf) < options.seconds
        or limits.get('memory_gb', math.inf) < options.memory_gb
    )


def run_entry(entry: Entry, options: Options, pack: bool) -> Result:
    """One config's result, from a process of its own where it has to be run."""
    result: Result = dict(
        config=entry.config, folder=entry.folder, detector=entry.detector, backbone=entry.backbone
    )
    if entry.problem:
        return {**result, 'status': 'unread', 'reason': entry.problem}
    if entry.same_as:
        return {**result, 'status': 'same', 'reason': f'the model of {entry.same_as}'}
    # Forked: torch and mmdet are imported once for all. No thread runs in this process.
    context = multiprocessing.get_context('fork')
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_trial, args=(entry.config, options, pack, theirs))
    child.start()
    theirs.close()
    end = time.monotonic() + options.seconds
    noted: Result = {}
    while True:
        if not ours.poll(max(0.0, end - time.monotonic())):
            child.kill()
            noted.update(status=None, reason=f'stopped after {options.seconds:.0f} s')
            noted['limited'] = {'seconds': options.seconds}
            break
        try:
            noted.update(ours.recv())
        except EOFError:
            break
    child.join()
    if not noted.get('status'):
        code = child.exitcode or 0
        signalled = f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
        noted['status'] = 'dense fails' if noted.get('stage', 'dense') == 'dense' else 'fails'
        noted['reason'] = noted.get('reason') or signalled
    if noted['status'] != 'runs' and re.search(OUT_OF_MEMORY, noted.get('reason', '')):
        noted['limited'] = {'memory_gb': options.memory_gb}
        noted['reason'] += f' (it may take {options.memory_gb:g} GB)'
    return {**result, **noted}


def _trial(config: str, options: Options, pack: bool, out: Connection) -> None:
    """The child process: limits, output into the log, and the trial."""
    log = options.log.open('a', buffering=1, encoding='utf-8')
    sys.stdout = sys.stderr = log
    # What native code says.
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    limit = int(options.memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    # mmengine lists every parameter that it initialises.
    logging.disable(logging.WARNING)
    start, cpu = time.perf_counter(), time.process_time()

    def note(**values: Any) -> None:
        out.send(values)

    print(f'--- {config}')
    try:
        try_config(stock_zoo_config(config), note, pack)
        note(status='runs')
    except DenseFailure as error:
        traceback.print_exc()
        note(status='dense fails', reason=str(error))
    except Exception as error:  # the result says what it was
        traceback.print_exc()
        note(status='fails', reason=one_line(error))
    took = {'cpu_s': time.process_time() - cpu, 'seconds': time.perf_counter() - start}
    note(**{key: round(value, 1) for key, value in took.items()}, peak_mb=peak_mb())
    out.close()
