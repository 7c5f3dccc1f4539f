"""Reads what mmengine's Runner writes, and runs nothing that a checkpoint brings along.

A checkpoint is a pickle, and a pickle may call any function. torch >= 2.6 therefore reads with
``weights_only=True``, which cannot read a Runner's checkpoints (``HistoryBuffer``, a ``getattr``,
numpy scalars), and older torch reads and runs everything. :func:`load_checkpoint_file` reads with
an unpickler of its own, on every torch alike. What holds in it:

- A name in the file is looked up in a table and never imported; what is not in the table is an
  error that says the name. Classes and functions that may be called lie on the unpickler's stack
  as inert :class:`_Admitted` tokens, so a file cannot change their attributes or smuggle them out.
- Opcodes are listed too. ``BUILD`` (``__setstate__`` and ``__dict__``) works on four types alone,
  each with its state checked: a ``HistoryBuffer`` does not write into its class, as its own
  ``__setstate__`` would; an array or a dtype never holds objects; an ``OrderedDict`` takes
  ``_metadata`` only.
- The names in the table are those that real Runners of all mmengine schedulers and the usual
  optimizers were seen to write, and those of plain state dicts.

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

import _compat_pickle
import io
import os
import pickle
import pickletools
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlparse

import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dist import barrier, get_rank
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from slope_mm.errors import CheckpointError, nearest

# The number that opens torch's older file format, as its pickle stores it.
_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little')


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint file at this path."""


class _Refused(pickle.UnpicklingError):
    """Its text names what the file asked for and does not get."""


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A class or function of the table as a file sees it: nothing but the unpickler can call it."""

    name: str
    build: Callable[..., Any] | None


# --- what may be called: each takes the file's arguments and trusts none of them -----------------


def _tensor_parts(storage: object, hooks: object = None) -> None:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _Refused(f'a tensor over {type(storage).__name__}')
    if hooks:  # torch writes an empty dict; a hook would run in the next backward pass
        raise _Refused('torch.Tensor._backward_hooks')


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    _tensor_parts(storage)
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, *rest: Any
) -> torch.Tensor:
    _tensor_parts(storage, hooks)
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, grad, hooks, *rest)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, *rest: Any
) -> torch.Tensor:
    _tensor_parts(storage, hooks)
    return torch._utils._rebuild_tensor_v3(storage, offset, size, stride, grad, hooks, *rest)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    if type(data) is not torch.Tensor or hooks:
        raise _Refused('torch._utils._rebuild_parameter')
    return torch.nn.Parameter(data, requires_grad)


def _numpy_dtype(spec: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    # Numbers and strings; no objects, no records. A copy, because BUILD sets its byte order.
    if type(spec) is not str or not re.fullmatch(r'[biufcSU]\d+', spec):
        raise _Refused(f'numpy.dtype({spec!r})')
    return np.dtype(spec, copy=True)


def _numpy_array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    if not (type(kind) is _Admitted and kind.name == 'numpy.ndarray'):
        raise _Refused(f'an array of type {_describe(kind)}')
    return np.ndarray((0,), 'b')  # an empty shell; BUILD gives it dtype, shape and content


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        raise _Refused(f'a numpy scalar of {_describe(dtype)}')
    return np.ndarray((), dtype, data)[()]


def _latin1(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ('latin1', 'latin-1'):
        raise _Refused(f'_codecs.encode(..., {encoding!r})')
    return text.encode('latin1')  # how protocol 2 writes bytes


def _default_dict(factory: Any = None) -> defaultdict[Any, Any]:
    kinds = {'builtins.dict': dict, 'builtins.int': int, 'builtins.list': list, 'builtins.set': set}
    if factory is None:
        return defaultdict()
    if type(factory) is not _Admitted or factory.name not in kinds:
        raise _Refused(f'collections.defaultdict({_describe(factory)})')
    return defaultdict(kinds[factory.name])


def _config_dict(items: Any) -> ConfigDict:
    if type(items) is not dict:
        raise _Refused(f'mmengine ConfigDict({_describe(items)})')
    return ConfigDict(items)


def _method(owner: Any, name: Any) -> Any:
    if type(owner) is _Admitted and type(name) is str and name in _METHODS.get(owner.name, ()):
        return getattr(_OWNERS[owner.name], name)
    raise _Refused(f'builtins.getattr({_describe(owner)}, {name!r})')


def _describe(value: object) -> str:
    return value.name if isinstance(value, _Admitted) else type(value).__name__


_HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
_ONE_CYCLE = 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'
_OWNERS: dict[str, type] = {_HISTORY: HistoryBuffer, _ONE_CYCLE: OneCycleParamScheduler}
# A HistoryBuffer saves its statistics, a one-cycle scheduler its curve, as functions of the class.
_METHODS = {
    _HISTORY: ('min', 'max', 'current', 'mean'),
    _ONE_CYCLE: ('_annealing_cos', '_annealing_linear'),
}

# Global name -> what calling it does; None: may be named, as an argument, but not be called.
_CALLABLES: dict[str, Callable[..., Any] | None] = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor_v2,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._utils._rebuild_parameter': _parameter,
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    'collections.OrderedDict': OrderedDict,
    'collections.Counter': Counter,  # the milestones of MultiStepLR
    'collections.defaultdict': _default_dict,
    'builtins.dict': None,
    'builtins.int': None,
    'builtins.list': None,
    'builtins.set': set,
    'builtins.frozenset': frozenset,
    'builtins.bytes': lambda: b'',  # only the empty one is written this way
    'builtins.bytearray': bytearray,
    'builtins.complex': complex,
    'builtins.slice': slice,
    'builtins.range': range,
    'builtins.getattr': _method,
    '_codecs.encode': _latin1,
    'numpy.ndarray': None,
    'numpy.dtype': _numpy_dtype,
    'numpy.core.multiarray._reconstruct': _numpy_array,
    'numpy._core.multiarray._reconstruct': _numpy_array,
    'numpy.core.multiarray.scalar': _numpy_scalar,
    'numpy._core.multiarray.scalar': _numpy_scalar,
    'mmengine.config.config.ConfigDict': _config_dict,  # nested metainfo of a data set
    _HISTORY: lambda: HistoryBuffer.__new__(HistoryBuffer),
    _ONE_CYCLE: None,
}

# Global name -> the object itself: immutable, and REDUCE calls tokens only.
_VALUES: dict[str, Any] = {
    str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
_VALUES['torch.storage.UntypedStorage'] = torch.UntypedStorage


# --- what may be given a state -------------------------------------------------------------------


def _set_state(target: Any, state: Any) -> None:
    if type(target) is OrderedDict:
        # The version numbers of a state dict. Any other name could hide a method of the dict.
        if type(state) is not dict or set(state) - {'_metadata'}:
            raise _Refused(f'collections.OrderedDict.__setstate__({_describe(state)})')
        target.__dict__.update(state)
    elif type(target) is HistoryBuffer:
        # Its own __setstate__ would add the file's functions to the class.
        parts = {'max_length', '_log_history', '_count_history'}
        if type(state) is not dict or set(state) - parts - {'statistics_methods'}:
            raise _Refused(f'{_HISTORY}.__setstate__({_describe(state)})')
        target._set_default_statistics()
        target.__dict__.update((key, state[key]) for key in state if key in parts)
    elif type(target) is np.ndarray:
        if (
            type(state) is not tuple
            or len(state) != 5
            or not isinstance(state[2], np.dtype)
            or type(state[4]) is not bytes
        ):
            raise _Refused('numpy.ndarray.__setstate__')
        target.__setstate__(state)  # checks shape, dtype and length against each other
    elif isinstance(target, np.dtype):
        _set_dtype_state(target, state)
    else:
        raise _Refused(f'{type(target).__module__}.{type(target).__qualname__}.__setstate__')


def _set_dtype_state(dtype: Any, state: Any) -> None:
    # numpy believes item size and flags, a wrong one of which reads foreign memory: compare all
    # but the byte order with what the dtype says of itself.
    own = dtype.__reduce__()[2]
    same = type(state) is tuple and len(state) == len(own) and state[1] in ('<', '>', '|', '=')
    if not same or state[2:] != own[2:]:
        raise _Refused(f'numpy.dtype.__setstate__ on {dtype}')
    dtype.__setstate__((own[0], *state[1:]))


# --- the machine ---------------------------------------------------------------------------------


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        names = [opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code]
        raise _Refused(f'pickle opcode {names[0] if names else hex(code)}')


# Those that move plain data, of protocol 2 (which torch.save writes) to 5.
_PLAIN_OPCODES = (
    'PROTO FRAME STOP MARK POP POP_MARK DUP BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE '
    'NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT '
    'BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 '
    'BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 '
    'EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT EMPTY_SET FROZENSET '
    'GLOBAL STACK_GLOBAL'
)


class _Unpickler(pickle._Unpickler):
    """The standard library's Python unpickler with every opcode that can call code replaced."""

    # The C unpickler has find_class as its only door: it would let BUILD set attributes of an
    # admitted class or function. Python's pace does not matter: a Mask R-CNN checkpoint with AdamW
    # and EMA is 533 MB and 44,000 opcodes.

    stack: list[Any]
    append: Callable[[Any], None]
    readline: Callable[[], bytes]

    if TYPE_CHECKING:

        def pop_mark(self) -> list[Any]: ...

    def find_class(self, module: str, name: str) -> Any:
        full = _global_name(module, name)
        if full in _VALUES:
            return _VALUES[full]
        if full in _CALLABLES:
            return _Admitted(full, _CALLABLES[full])
        owner, _, attribute = full.rpartition('.')
        if attribute in _METHODS.get(owner, ()):  # protocol 4 writes Class.method as one name
            return getattr(_OWNERS[owner], attribute)
        # A statistic that this program itself has registered: named by the file, never called.
        for statistic in HistoryBuffer._statistics_methods.values():
            if full == f'{statistic.__module__}.{getattr(statistic, "__qualname__", "")}':
                return statistic
        raise _Refused(full)

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Admitted:
            raise _Refused(f'a call of {_describe(function)}')
        if function.build is None or type(arguments) is not tuple:
            raise _Refused(f'{function.name}(...)')
        self.append(function.build(*arguments))

    def _build(self) -> None:
        state = self.stack.pop()
        _set_state(self.stack[-1], state)

    def _inst(self) -> None:
        module, name = (self.readline()[:-1].decode('utf-8') for _ in range(2))
        raise _Refused(_global_name(module, name))

    def _persistent_id(self) -> None:
        identity = self.stack.pop()
        # torch's other kind, 'module', compares source files and may write a patch beside them.
        if type(identity) is not tuple or identity[:1] not in (('storage',), (b'storage',)):
            raise _Refused('a persistent id that is no storage')
        self.append(self.persistent_load(identity))

    def _append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise _Refused(f'{_describe(self.stack[-1])}.extend')
        self.stack[-1].extend(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter, defaultdict):
            raise _Refused(f'{_describe(target)}.__setitem__')
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    def _add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise _Refused(f'{_describe(self.stack[-1])}.update')
        self.stack[-1].update(items)

    dispatch = _Opcodes(
        {
            code: pickle._Unpickler.dispatch[code]
            for code in (getattr(pickle, name)[0] for name in _PLAIN_OPCODES.split())
        }
        | {
            pickle.REDUCE[0]: _reduce,
            pickle.NEWOBJ[0]: _reduce,  # cls.__new__(cls, *args): the table's builders do that
            pickle.BUILD[0]: _build,
            pickle.INST[0]: _inst,
            pickle.BINPERSID[0]: _persistent_id,
            pickle.APPEND[0]: _append,
            pickle.APPENDS[0]: _appends,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: _set_items,
            pickle.ADDITEMS[0]: _add_items,
        }
    )


def _global_name(module: str, name: str) -> str:
    # Protocol 2 writes Python 2's names: __builtin__, copy_reg.
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f'{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}'


class _RestrictedPickle:
    """What ``torch.load`` wants of a ``pickle_module``."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _Unpickler(file, **options).load()


# --- the reader ----------------------------------------------------------------------------------


def load_checkpoint_file(path: str | os.PathLike[str], map_location: Any = 'cpu') -> Any:
    """Reads a checkpoint of mmengine's Runner, or any file of tensors that ``torch.save`` wrote.

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
    forced = os.getenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '').lower() in ('1', 'y', 'yes', 'true')
    options: dict[str, Any] = {'pickle_module': _RestrictedPickle, 'weights_only': False}
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
                f'{name} {start} and is no file of torch.save; give the path of a .pth checkpoint'
            )
        checkpoint = torch.load(file, map_location=map_location, mmap=False, **options)
        _drop_program(checkpoint)
        return checkpoint
    except (CheckpointError, MemoryError):
        raise
    except _Refused as refusal:
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
