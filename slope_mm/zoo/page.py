"""``zoo.json`` and ``zoo.md``: a run's results, committed, and the page that is drawn from them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slope_mm.errors import ConfigError
from slope_mm.wholefile import write_whole

Result = Mapping[str, Any]

# What is said where the system refuses memory.
OUT_OF_MEMORY = r'alloc|memory|MemoryError'
# What a stock failure is called in the summary, by what its message says.
CAUSES = (
    (r'mmpretrain', 'needs mmpretrain'),
    (r'transformers|nltk|fairscale', 'needs transformers'),
    (r'sklearn', 'needs scikit-learn'),
    (r'skimage|scikit-image', 'needs scikit-image'),
    (r'[Dd]etectron2', 'needs detectron2'),
    (r'No module named|not installed|pip install|mim install', 'needs another package'),
    (r'FileNotFoundError', "inherits from a config that mmdet's package lacks"),
    (r'not compiled|CUDA|cuda|not implemented on CPU|implementation for device cpu', 'needs a GPU'),
    (r'NotImplementedError', 'does not train as a whole'),
    (OUT_OF_MEMORY, 'needs more memory than a trial gets'),
    (r'stopped after', 'takes too long here'),
)
# What may have installed a package: OpenMMLab, or the maintained forks.
DISTRIBUTIONS = {
    'torch': ('torch',),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
}
GOAL = 0.98
# Reasons of the default rules and of formats: what they leave dense is meant to be.
NAMED = ('sampling offsets', 'its weight is computed by a hook')


def cause(reason: str) -> str:
    """The short name of why a stock model does not run."""
    return next((name for pattern, name in CAUSES if re.search(pattern, reason)), 'stock fails')


def write_page(folder: Path, results: Mapping[str, Result] | None) -> str:
    """Writes both files, or the page alone.

    Args:
        folder: Where they lie.
        results: A run's results by config, which join those of ``zoo.json``; None: what
            ``zoo.json`` holds.

    Returns:
        The summary, to print.

    Raises:
        ConfigError: If there is nothing to report.
    """
    path = folder / 'zoo.json'
    try:
        content = json.loads(path.read_text()) if path.is_file() else {'results': []}
    except ValueError as error:
        raise ConfigError(
            f"'{path}' cannot be read ({error}); restore it, or move it away to begin anew"
        ) from None
    known = {row['config']: row for row in content['results']}
    if results is not None:
        for name, row in results.items():
            # A limit says nothing about a model that has run.
            if not (row.get('limited') and known.get(name, {}).get('status') == 'runs'):
                known[name] = row
        # A package that is not installed now may be one that older results were measured with.
        measured_with = {**content.get('versions', {}), **_versions()}
        content = {'versions': measured_with, 'results': [known[name] for name in sorted(known)]}
    if not known:
        raise ConfigError(f"there is no '{path}' to report; run the zoo first")
    rows = content['results']
    folder.mkdir(parents=True, exist_ok=True)
    if results is not None:
        lines = ',\n'.join(json.dumps(row) for row in rows)
        versions = json.dumps(content['versions'])
        text = f'{{"versions": {versions}, "results": [\n{lines}\n]}}\n'
        write_whole(path, text.encode())
    write_whole(folder / 'zoo.md', _page(rows, content['versions']).encode())
    return '\n'.join(summary(rows))


def _versions() -> dict[str, str]:
    found = {'python': platform.python_version()}
    for name, distributions in DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


# --- the page ------------------------------------------------------------------------------------


def summary(rows: Iterable[Result]) -> list[str]:
    """Counts, a line each."""
    rows = list(rows)
    dense = [row for row in rows if row['status'] in ('runs', 'fails')]
    runs = [row for row in dense if row['status'] == 'runs']
    sound = [row for row in runs if not complaints(row)]
    whole = [row for row in runs if accounted(row) >= GOAL]
    named = [row for row in whole if row['compressed'] < GOAL]
    packed = [row for row in runs if 'packed' in row]
    same = sum(row['status'] == 'same' for row in rows)
    counts: dict[str, int] = {}
    for row in rows:
        if row['status'] in ('unread', 'dense fails'):
            counts[cause(row['reason'])] = counts.get(cause(row['reason']), 0) + 1
    lines = [
        f'- {len(rows)} configs that stand for the zoo were tried (`tools/zoo.py --list` names'
        f' all); {same} of them repeat the model of another and were not run again.',
        f'- {len(dense)} dense twins run here; {len(runs)} of them also run compressed'
        f' ({len({r["detector"] for r in runs})} detector classes,'
        f' {len({r["backbone"] for r in runs})} backbones), {len(sound)} without any complaint.',
        f'- {len(whole)} of {len(runs)} have at least {GOAL:.0%} of the weights of matrix products'
        ' and convolutions compressed'
        + (f', {len(named)} of them not counting {NAMED[0]}.' if named else '.'),
        f'- {sum(row["packed"] == "equal" for row in packed)} of {len(packed)} packed files (one'
        " for each of mmdet's classes, and of each other model) gave the compressed weights back"
        ' bit for bit.',
    ]
    if counts:
        told = ', '.join(f'{n} x {name}' for name, n in sorted(counts.items(), key=lambda i: -i[1]))
        lines.append(
            f'- {sum(counts.values())} stock configs do not run here by themselves: {told}.'
        )
    return lines


def accounted(row: Result) -> float:
    """Share of the weights that is compressed, or dense by a rule that names it."""
    return row['compressed'] + sum(share for why, share, _ in row['dense_left'] if why in NAMED)


def complaints(row: Result) -> list[str]:
    """What is not as it should be in a compressed twin that runs."""
    found = []
    if row['steps_without_gradient']:
        names = row['steps_without_gradient']
        found.append(f'{len(names)} of {row["steps"]} steps without gradient, {names[0]} first')
    if not row['shared_kept']:
        found.append('shared modules are no longer shared')
    if not row['finite']:
        found.append('parameters not finite after the step')
    if row['baked'] != 'equal' and not _small(row['baked']):
        found.append(f'baked: {row["baked"]}')
    if row.get('packed', 'equal') != 'equal':
        found.append('packed weights differ')
    return found


def _small(baked: str) -> bool:
    """Whether a difference is one of rounding."""
    number = re.match(r'([\d.e+-]+) at', baked)
    return number is not None and float(number[1]) < 1e-4


def _page(rows: list[Result], versions: Mapping[str, str]) -> str:
    told = ', '.join(f'{name} {version}' for name, version in versions.items())
    head = [
        '# The zoo',
        '',
        "One config per model folder, detector class and backbone class of mmdet's configs"
        ' (`slope_mm/zoo/catalogue.py` has the rule), each dense and as SlopeModel at 2:4, W4A4:',
        'built, loaded with the same state dict, trained for one step, asked for a prediction,'
        ' baked, loaded into the stock model with `strict=True` and compared, packed, read back.',
        '',
        '    python tools/zoo.py                     # --only PATTERN, --part 1/4; goes on where it'
        ' was stopped',
        '    python tools/zoo.py --report-only       # this page from docs/zoo.json',
        '',
        f'Measured with {told}, on CPU, random weights, two small images of noise; a process of'
        ' its own for each config, of 8 GB at most where its row does not tell another limit.',
        'SyncBN is BN and AMP is off in both twins, stages are not frozen, second stages train'
        ' on 32 regions; nothing is downloaded.',
        'A few models of mmpretrain and mmseg take the same way, where these packages are installed'
        ' (`PACKAGE::` before the folder).',
        '',
        *summary(rows),
        '',
        '**Share** is that of weights in matrix products and convolutions: compressed at all, and'
        ' sparse (2:4) as well. Embeddings and position tables multiply nothing and are not'
        ' counted.',
        '**Dense** says what stays at full precision, **not sparse** what is quantized alone, with'
        ' their share of the weights.',
        '**Baked** is the largest relative difference between outputs of the compressed model',
        '(inputs not quantized) and of the stock model with baked weights, over all layers and the'
        ' prediction. **Steps** counts those with a gradient; an input of zeros (a first decoder'
        " layer's content) has no range to learn.",
        '',
    ]
    parts = [*head, *_short_of_the_goal(rows)]
    families = sorted({row['folder'] for row in rows})
    ran = [row for row in rows if row['status'] in ('runs', 'fails')]
    for family in families:
        own = [row for row in ran if row['folder'] == family]
        if own:
            parts += [f'### {family}', '', *_table(own), '']
    rest = [row for row in rows if row['status'] in ('unread', 'dense fails')]
    if rest:
        parts += ['## Stock configs that do not run here', '']
        parts += ['| config | cause | what it says |', '|---|---|---|']
        for row in rest:
            said = row['reason'].replace('|', '/')
            parts.append(f'| {_name(row)} | {cause(row["reason"])} | {said} |')
        parts.append('')
    same = [row for row in rows if row['status'] == 'same']
    if same:
        parts += ['## The same model under another name', '']
        parts += [f'- {_name(row)}: {row["reason"]}' for row in same]
        parts.append('')
    return '\n'.join(parts)


def _short_of_the_goal(rows: Iterable[Result]) -> list[str]:
    """What ran dense and is not as it should be compressed, each with its reason."""
    lines = []
    for row in rows:
        name = f'{row["folder"]}/{_name(row)}'
        if row['status'] == 'fails':
            lines.append(f'- {name} fails: {row["reason"]}')
        elif row['status'] == 'runs':
            lines += [f'- {name}: {complaint}' for complaint in complaints(row)]
            if accounted(row) < GOAL:
                lines.append(f'- {name}: {row["compressed"]:.2%}; {_reasons(row["dense_left"])}')
    return ['## Short of the goal', '', *(lines or ['Nothing.']), '']


COLUMNS = (
    'config',
    'detector, backbone',
    'weights',
    'compressed',
    'sparse',
    'dense: why',
    'not sparse: why',
    'shared',
    'steps',
    'baked',
    'packed',
    'complaints',
)


def _table(rows: Iterable[Result]) -> list[str]:
    lines = [f'| {" | ".join(COLUMNS)} |', '|' + '---|' * len(COLUMNS)]
    for row in rows:
        kind = f'{row["detector"]}, {row["backbone"]}'
        if row['status'] != 'runs':
            blank = [''] * (len(COLUMNS) - 3)
            cells = [_name(row), kind, *blank, f'fails: {row["reason"]}']
        else:
            cells = [
                _name(row),
                kind,
                f'{row["weights"] / 1e6:.1f} M',
                f'{row["compressed"]:.2%}',
                f'{row["sparse"]:.2%}',
                _reasons(row['dense_left']),
                _reasons(row['not_sparse']),
                str(row['shared'] or ''),
                _steps(row),
                row['baked'].split(' at ')[0],
                f'{row["ratio"]}x' if row.get('packed') == 'equal' else row.get('packed', ''),
                '; '.join(complaints(row)),
            ]
        lines.append(f'| {" | ".join(cell.replace("|", "/") for cell in cells)} |')
    return lines


def _steps(row: Result) -> str:
    blank = len(row['inputs_of_zeros'])
    trained = row['steps'] - len(row['steps_without_gradient']) - blank
    return f'{trained}/{row["steps"]}' + (f', {blank} of zeros' if blank else '')


def _reasons(found: Iterable[Iterable[Any]]) -> str:
    """Reasons with their share, the channel numbers of one reason taken together."""
    shares: dict[str, float] = {}
    for reason, share, _ in found:
        general = re.sub(r'^\d+ input channels hold no \S+: no sparsity', 'channels', str(reason))
        general = re.sub(r'^grouped \(\d+\).*', 'grouped', general)
        shares[general] = shares.get(general, 0.0) + share
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ', '.join(f'{reason} {share:.2%}' for reason, share in ordered)


def _name(row: Result) -> str:
    return str(row['config']).split('/', 1)[1].removesuffix('.py')
