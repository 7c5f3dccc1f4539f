"""Reads what mmengine's Runner writes, and runs nothing that a checkpoint brings along.

A checkpoint is a pickle, and a pickle may call any function. torch >= 2.6 therefore reads with
``weights_only=True``, which cannot read a Runner's checkpoints (``HistoryBuffer``, a ``getattr``,
numpy scalars), and older torch reads and runs everything. :func:`load_checkpoint_file` reads with
an unpickler of its own, on every torch alike (:mod:`slope_mm.engine.unpickler`).

``torch.load(pickle_module=...)`` sends every pickle of the zip format and of the older one (the
header records too) through that unpickler. What would go past it never gets there: a TorchScript
archive, which torch hands to ``torch.jit.load``, is refused; the tar format of 2016, whose reader
unpacks files, is tried on real files only and gets bytes; safetensors is chosen by a path's ending
and gets an open file; ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` does not count where ``weights_only`` is
given; under ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` torch's own reader is used, which reads plain state
dicts only. One thing is left to torch: older versions (2.1, not 2.13) believe a file about the
length of a tensor's record, so that a forged one yields foreign memory as weights. It runs nothing.

mmengine's schemes (``mmengine/runner/checkpoint.py``), after :func:`install`:

====================================  ==========================================================
``''`` (a local path)                 ours
``http://``, ``https://``             ours; mmengine's goes through ``torch.hub``, which passes
                                      ``weights_only=False`` on any torch
``open-mmlab://``, ``openmmlab://``   ours, for URLs and for files under ``MMENGINE_HOME``
``torchvision://``, ``modelzoo://``,  mmengine's tables of names, then our http reader
``mmcls://``
``s3://``, ``petrel://``              ours, on the bytes that the backend returns
``pavi://``                           left as it is (needs a package that is not public)
====================================  ==========================================================

Through them ``tools/test.py``, ``--resume``, ``load_from``, ``init_detector``, ``DetInferencer``
and ``init_cfg=dict(type='Pretrained')`` are covered. Not covered, since they never ask
``CheckpointLoader``: direct calls of ``torch.load``, DeepSpeed's and ColossalAI's own formats, and
``.pkl`` result files. The zipped single files of torch.hub's early years are not unpacked.

A checkpoint also carries the text of its config, and a config is a program. ``Runner.resume`` runs
``meta['config']`` (mmcv 1.x wrote it): the reader drops that entry. An inferencer that is given
weights and no config runs ``cfg``: that is what its caller asks for, so give a config beside the
weights of strangers.
"""

from __future__ import annotations

import io
import os
import re
from typing import IO, Any
from urllib.parse import urlparse

import mmengine.runner.checkpoint as mmengine_checkpoint
import torch
from mmengine.dist import barrier, get_rank
from mmengine.fileio import get_file_backend
from mmengine.logging import print_log

from slope_mm.engine.packed import read_packed_checkpoint
from slope_mm.engine.unpickler import Refused, RestrictedPickle
from slope_mm.errors import CheckpointError, PackedFileError, nearest
from slope_mm.packing.container import is_packed

# In a checkpoint's meta: its weights are compressed ones, of a stock model.
BAKED = 'slope_mm_baked'
# The number that opens torch's older file format, as its pickle stores it.
_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little')


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint file at this path."""


# --- the reader ----------------------------------------------------------------------------------


def load_checkpoint_file(path: str | os.PathLike[str], map_location: Any = 'cpu') -> Any:
    """Reads a checkpoint of mmengine's Runner, any file of tensors that ``torch.save`` wrote, or a
    packed file, as the checkpoint of a model whose latent weights are the compressed ones.

    Args:
        path: The file; ``~`` is expanded.
        map_location: As in :func:`torch.load`: a device, a callable, a dict, or None for the
            device that each tensor was saved from. Defaults to ``'cpu'``.

    Returns:
        What was saved: a Runner's dict (``state_dict``, ``meta``, ``message_hub``, ...) or a plain
        state dict. ``meta['config']`` is left out.

    Raises:
        CheckpointNotFoundError: There is no file at ``path``. Also a ``FileNotFoundError``, which
            is what mmengine raises there.
        CheckpointError: The file asks for a function or class beyond the table of this module, is
            damaged, or is no checkpoint.
    """
    name = os.path.expanduser(os.fspath(path))
    if os.path.isdir(name):
        raise CheckpointNotFoundError(f'{name} is a directory; name the checkpoint file in it')
    try:
        with open(name, 'rb') as file:
            return _read(file, name, map_location)
    except FileNotFoundError:
        folder = os.path.dirname(name) or os.curdir
        names = os.listdir(folder) if os.path.isdir(folder) else []
        near = nearest(os.path.basename(name), [n for n in names if n.endswith('.pth')])
        raise CheckpointNotFoundError(
            f'the checkpoint {name} does not exist; check the path{near}'
        ) from None
    except OSError as error:
        raise CheckpointError(
            f'the checkpoint {name} cannot be opened: {error.strerror}; check its permissions'
        ) from error


def _read(file: IO[bytes], name: str, map_location: Any) -> Any:
    head = file.read(64)
    file.seek(0)
    if is_packed(head):
        return read_packed_checkpoint(file.read(), name)
    forced = os.getenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '').lower() in ('1', 'y', 'yes', 'true')
    options: dict[str, Any] = {'pickle_module': RestrictedPickle, 'weights_only': False}
    if forced:  # torch then takes no unpickler but its own
        options = {'weights_only': True}
    try:
        if head.startswith(b'PK\x03\x04'):
            _refuse_torchscript(file, name)
        elif head.startswith(b'\x80') and _LEGACY_MAGIC in head:
            # Bytes have no file number: torch cannot try its tar reader on them.
            file = io.BytesIO(file.read())
        else:
            start = f'begins with {head[:12]!r}' if head else 'is empty'
            raise CheckpointError(
                f'{name} {start} and is neither a file of torch.save nor a packed file; give the'
                ' path of a .pth checkpoint or of a .slope file'
            )
        checkpoint = torch.load(file, map_location=map_location, mmap=False, **options)
        _drop_program(checkpoint)
        return checkpoint
    except (CheckpointError, PackedFileError, MemoryError):
        raise
    except Refused as refusal:
        raise CheckpointError(
            f'{name} asks to run {str(refusal)[:200]!r} while it is read, which no checkpoint of '
            'mmengine and no state dict needs; it was not loaded. Ask its maker for the '
            'state_dict alone, as torch.save writes it'
        ) from refusal
    except Exception as error:
        # torch surrounds the name of a refused global with pages of advice.
        unsafe = re.search(r'Unsupported global: GLOBAL \S+|GLOBAL \S+ whose module', str(error))
        reason = f'{type(error).__name__}: {unsafe.group() if unsafe else str(error)[:300]}'
        if 'deserialize object on' in reason:
            advice = "its tensors belong to a device that is not here; give map_location='cpu'"
        elif forced:
            advice = 'unset TORCH_FORCE_WEIGHTS_ONLY_LOAD: slope_mm reads as strictly, and more'
        else:
            advice = 'if it is damaged or incomplete, copy, download or save it again'
        raise CheckpointError(f'{name} cannot be read as a checkpoint; {advice} ({reason})') from (
            error
        )


def _drop_program(checkpoint: Any) -> None:
    # mmcv 1.x kept the config's text here. Nothing reads it but Runner.resume, which would run it
    # as Python, and which cannot resume from a checkpoint of mmcv 1.x anyway.
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)


def _refuse_torchscript(file: IO[bytes], name: str) -> None:
    # By torch's own test and zip reader, so that both see the same archive.
    if 'constants.pkl' in torch._C.PyTorchFileReader(file).get_all_records():
        raise CheckpointError(
            f'{name} is a TorchScript archive, which is a program; it was not loaded. Save the '
            "model's state_dict with torch.save and load that"
        )
    file.seek(0)


# --- mmengine's schemes: signatures and names are mmengine's, which logs load_from_NAME ----------


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Reads a local file; see :func:`load_checkpoint_file`."""
    return load_checkpoint_file(filename, map_location)


def load_from_http(
    filename: str,
    map_location: Any = None,
    model_dir: str | None = None,
    progress: bool | None = None,
) -> Any:
    """Reads the file at a URL, downloaded once to where torch.hub keeps its checkpoints.

    Args:
        filename: The URL.
        map_location: As in :func:`torch.load`.
        model_dir: The folder to keep the file in. Defaults to torch.hub's.
        progress: Show a progress bar. Defaults to True where standard input is a terminal.

    Raises:
        CheckpointError: The download fails, or the file cannot be read safely.
    """
    if get_rank() > 0:  # rank 0 downloads first
        barrier()
    path = _download(filename, model_dir, os.isatty(0) if progress is None else progress)
    if get_rank() == 0:
        barrier()
    return load_checkpoint_file(path, map_location)


def _download(url: str, model_dir: str | None, progress: bool) -> str:
    folder = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, os.path.basename(urlparse(url).path))
    if not os.path.exists(path):
        print_log(f'Downloads {url} to {path}', logger='current')
        try:
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=progress)
        except OSError as error:  # of the network, too
            raise CheckpointError(
                f'{url} could not be downloaded to {path} ({error}); fetch it by other means and '
                'give its path'
            ) from error
    return path


def load_from_openmmlab(filename: str, map_location: Any = None) -> Any:
    """Reads ``open-mmlab://NAME``: a URL or a file under MMENGINE_HOME by mmengine's tables."""
    name = filename.split('://', 1)[1]
    name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    places = mmengine_checkpoint.get_external_models()
    if name not in places:
        near = nearest(name, places)
        raise CheckpointError(f'{filename} is none of the models that mmengine knows{near}')
    place = places[name]
    if place.startswith(('http://', 'https://')):
        return load_from_http(place, map_location)
    home = mmengine_checkpoint._get_mmengine_home()
    return load_checkpoint_file(os.path.join(home, place), map_location)


def load_from_ceph(filename: str, map_location: Any = None, backend: str = 'petrel') -> Any:
    """Reads an object of an object store through mmengine's file backend of that name."""
    content = get_file_backend(filename, backend_args={'backend': backend}).get(filename)
    return _read(io.BytesIO(content), filename, map_location)


def install() -> None:
    """Makes mmengine's ``CheckpointLoader`` read with :func:`load_checkpoint_file`.

    Called when slope_mm is imported. May be called again. See the module's table of schemes.
    """
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
        ((r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), load_from_ceph),
    ):
        mmengine_checkpoint.CheckpointLoader.register_scheme(prefixes, loader=loader, force=True)
    # The loaders of torchvision:// and mmcls:// call this one by its name in mmengine's module.
    mmengine_checkpoint.load_from_http = load_from_http
