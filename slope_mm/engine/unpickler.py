"""A restricted unpickler for checkpoints: it looks names up in a table and imports nothing.

What holds in it:

- A name in the file is looked up in a table and never imported; what is not in the table is an
  error that says the name. Classes and functions that may be called lie on the unpickler's stack
  as inert :class:`_Admitted` tokens, so a file cannot change their attributes or smuggle them out.
- Opcodes are listed too. ``BUILD`` (``__setstate__`` and ``__dict__``) works on four types alone,
  each with its state checked: a ``HistoryBuffer`` does not write into its class, as its own
  ``__setstate__`` would; an array or a dtype never holds objects; an ``OrderedDict`` takes
  ``_metadata`` only.
- The names in the table are those that real Runners of all mmengine schedulers and the usual
  optimizers were seen to write, and those of plain state dicts.
"""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler


class Refused(pickle.UnpicklingError):
    """Its text names what the file asked for and does not get."""


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A class or function of the table as a file sees it: nothing but the unpickler can call it."""

    name: str
    build: Callable[..., Any] | None


# --- what may be called: each takes the file's arguments and trusts none of them -----------------


def _tensor_parts(storage: object, hooks: object = None) -> None:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise Refused(f'a tensor over {type(storage).__name__}')
    if hooks:  # torch writes an empty dict; a hook would run in the next backward pass
        raise Refused('torch.Tensor._backward_hooks')


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
        raise Refused('torch._utils._rebuild_parameter')
    return torch.nn.Parameter(data, requires_grad)


def _numpy_dtype(spec: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    # Numbers and strings; no objects, no records. A copy, because BUILD sets its byte order.
    if type(spec) is not str or not re.fullmatch(r'[biufcSU]\d+', spec):
        raise Refused(f'numpy.dtype({spec!r})')
    return np.dtype(spec, copy=True)


def _numpy_array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    if not (type(kind) is _Admitted and kind.name == 'numpy.ndarray'):
        raise Refused(f'an array of type {_describe(kind)}')
    return np.ndarray((0,), 'b')  # an empty shell; BUILD gives it dtype, shape and content


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        raise Refused(f'a numpy scalar of {_describe(dtype)}')
    return np.ndarray((), dtype, data)[()]


def _latin1(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ('latin1', 'latin-1'):
        raise Refused(f'_codecs.encode(..., {encoding!r})')
    return text.encode('latin1')  # how protocol 2 writes bytes


def _byte_array(content: Any = b'', encoding: Any = None) -> bytearray:
    if type(content) is bytes and encoding is None:
        return bytearray(content)
    if type(content) is not str or encoding != 'latin-1':
        raise Refused(f'builtins.bytearray({_describe(content)})')  # a number asks for memory
    return bytearray(content, encoding)  # how protocol 2 writes it


def _default_dict(factory: Any = None) -> defaultdict[Any, Any]:
    kinds = {'builtins.dict': dict, 'builtins.int': int, 'builtins.list': list, 'builtins.set': set}
    if factory is None:
        return defaultdict()
    if type(factory) is not _Admitted or factory.name not in kinds:
        raise Refused(f'collections.defaultdict({_describe(factory)})')
    return defaultdict(kinds[factory.name])


def _collection(kind: Callable[..., Any], name: str) -> Callable[..., Any]:
    """What is made of a list that the file holds: a range would be laid out."""

    def make(items: Any = ()) -> Any:
        if type(items) not in (list, tuple, set, dict):
            raise Refused(f'{name}({_describe(items)})')
        return kind(items)

    return make


# A ConfigDict copies what it is made of, and what is named twice twice.
_MOST_ITEMS = 10**5


def _config_dict(items: Any) -> ConfigDict:
    if type(items) is not dict:
        raise Refused(f'mmengine ConfigDict({_describe(items)})')
    waiting: list[Any] = [items]
    left = _MOST_ITEMS
    while waiting:
        item = waiting.pop()
        parts = list(item.values()) if isinstance(item, dict) else list(item)
        left -= len(parts)
        if left < 0:
            raise Refused(f'mmengine ConfigDict of more than {_MOST_ITEMS} items')
        waiting += [part for part in parts if isinstance(part, (dict, list, tuple))]
    return ConfigDict(items)


def _method(owner: Any, name: Any) -> Any:
    if type(owner) is _Admitted and type(name) is str and name in _METHODS.get(owner.name, ()):
        return getattr(_OWNERS[owner.name], name)
    raise Refused(f'builtins.getattr({_describe(owner)}, {name!r})')


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
    'torch.Size': _collection(torch.Size, 'torch.Size'),
    'torch.device': torch.device,
    'collections.OrderedDict': OrderedDict,
    # The milestones of MultiStepLR.
    'collections.Counter': _collection(Counter, 'collections.Counter'),
    'collections.defaultdict': _default_dict,
    'builtins.dict': None,
    'builtins.int': None,
    'builtins.list': None,
    'builtins.set': _collection(set, 'builtins.set'),
    'builtins.frozenset': _collection(frozenset, 'builtins.frozenset'),
    'builtins.bytes': lambda: b'',  # only the empty one is written this way
    'builtins.bytearray': _byte_array,
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
            raise Refused(f'collections.OrderedDict.__setstate__({_describe(state)})')
        target.__dict__.update(state)
    elif type(target) is HistoryBuffer:
        # Its own __setstate__ would add the file's functions to the class.
        parts = {'max_length', '_log_history', '_count_history'}
        if type(state) is not dict or set(state) - parts - {'statistics_methods'}:
            raise Refused(f'{_HISTORY}.__setstate__({_describe(state)})')
        target._set_default_statistics()
        target.__dict__.update((key, state[key]) for key in state if key in parts)
    elif type(target) is np.ndarray:
        if (
            type(state) is not tuple
            or len(state) != 5
            or not isinstance(state[2], np.dtype)
            or type(state[4]) is not bytes
        ):
            raise Refused('numpy.ndarray.__setstate__')
        target.__setstate__(state)  # checks shape, dtype and length against each other
    elif isinstance(target, np.dtype):
        _set_dtype_state(target, state)
    else:
        raise Refused(f'{type(target).__module__}.{type(target).__qualname__}.__setstate__')


def _set_dtype_state(dtype: Any, state: Any) -> None:
    # numpy believes item size and flags, a wrong one of which reads foreign memory: compare all
    # but the byte order with what the dtype says of itself.
    own = dtype.__reduce__()[2]
    same = type(state) is tuple and len(state) == len(own) and state[1] in ('<', '>', '|', '=')
    if not same or state[2:] != own[2:]:
        raise Refused(f'numpy.dtype.__setstate__ on {dtype}')
    dtype.__setstate__((own[0], *state[1:]))


# --- the machine ---------------------------------------------------------------------------------


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        names = [opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code]
        raise Refused(f'pickle opcode {names[0] if names else hex(code)}')


# Those that move plain data, of protocol 2 (which torch.save writes) to 5. Not BYTEARRAY8: it makes
# room for what a file says will follow, before anything does.
_PLAIN_OPCODES = (
    'PROTO FRAME STOP MARK POP POP_MARK DUP BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE '
    'NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT '
    'BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 '
    'BINBYTES SHORT_BINBYTES BINBYTES8 '
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
        raise Refused(full)

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Admitted:
            raise Refused(f'a call of {_describe(function)}')
        if function.build is None or type(arguments) is not tuple:
            raise Refused(f'{function.name}(...)')
        self.append(function.build(*arguments))

    def _build(self) -> None:
        state = self.stack.pop()
        _set_state(self.stack[-1], state)

    def _inst(self) -> None:
        module, name = (self.readline()[:-1].decode('utf-8') for _ in range(2))
        raise Refused(_global_name(module, name))

    def _persistent_id(self) -> None:
        identity = self.stack.pop()
        # torch's other kind, 'module', compares source files and may write a patch beside them.
        if type(identity) is not tuple or identity[:1] not in (('storage',), (b'storage',)):
            raise Refused('a persistent id that is no storage')
        self.append(self.persistent_load(identity))

    def _append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused(f'{_describe(self.stack[-1])}.extend')
        self.stack[-1].extend(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter, defaultdict):
            raise Refused(f'{_describe(target)}.__setitem__')
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    def _add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise Refused(f'{_describe(self.stack[-1])}.update')
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


class RestrictedPickle:
    """What ``torch.load`` wants of a ``pickle_module``."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _Unpickler(file, **options).load()
