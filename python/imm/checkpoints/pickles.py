"""The pickle format of published snapshots, read without running anything.

A pickle is a program: it names functions and classes, and ``pickle.load`` imports and calls them; the snapshots of EDM and its
descendants add Python source that their own loader executes. :func:`read_pickle` is an interpreter of its own for the opcodes
that such files hold. It uses neither ``pickle`` nor ``torch.load``: those do not bound what a file declares, and so the proof
that nothing runs is this file and the values that it makes (:mod:`imm.checkpoints.values`):

- The only values are None, bool, int, float, str, views of the file's bytes, tuple, list, ``torch.dtype`` constants and the
  records of that module. No file reaches a function, a class or a module of Python, and none sets an attribute by its name.
- A global is a name that is looked up in a table here, never an import. ``_GLOBALS`` holds every name that may be called, and
  our own function for it; a module's class, or a record's of OmegaConf, stands for an :class:`Object`, whatever its name; any
  other name ends the reading.
- Every value costs an opcode, of which a file has at most ``MAX_OPCODES``. Bytes are views, and strings are short. A dict is a
  list of pairs: no key is hashed before it is known to be a short string. A tensor is a description (:class:`TensorView`) until
  it is asked for, and lies inside its storage, which lies inside the file.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from imm.checkpoints.format import CheckpointError
from imm.checkpoints.values import OMEGACONF, Budget, NumpyType, Object, Storage, Table, TensorView, plain_name, short

#: Of one file with everything nested in it. The published DiT-XL/2 needs about 66,000.
MAX_OPCODES = 1_000_000
#: Bytes of one string; the longest that is expected is a module's source.
MAX_TEXT = 1 << 22
_MAX_DIMENSIONS = 8
_MODULE_CLASS = re.compile(r"(torch\.nn\.modules|timm\.layers|timm\.models)(\.[a-z][a-z0-9_]*)+\.[A-Z][A-Za-z0-9]*")
_OMEGACONF_METADATA = ("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata")
_BUILTINS = ("bool", "dict", "float", "int", "list", "str", "tuple")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

_DTYPES = {
    "torch.float64": torch.float64,
    "torch.float32": torch.float32,
    "torch.float16": torch.float16,
    "torch.bfloat16": torch.bfloat16,
    "torch.int64": torch.int64,
    "torch.int32": torch.int32,
    "torch.int16": torch.int16,
    "torch.int8": torch.int8,
    "torch.uint8": torch.uint8,
    "torch.bool": torch.bool,
}
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
#: NumPy's codes of scalars -> struct's.
_NUMPY = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_NUMPY |= {"f2": "e", "f4": "f", "f8": "d"}


class _Global:
    """A name that a file may use: what stands here for its call, with how many arguments, or for making an instance."""

    __slots__ = ("arguments", "call", "name", "new")

    def __init__(
        self, name: str, arguments: int = 0, call: Callable[..., Any] | None = None, new: Callable[[], Any] | None = None
    ) -> None:
        self.name, self.arguments, self.call, self.new = name, arguments, call, new


def read_pickle(view: memoryview) -> Any:
    """What a snapshot's bytes hold, in inert values; nothing named in them is imported or called.

    Args:
        view: the whole file: a pickle of protocol 3 to 5, or a file of ``torch.save`` (either of its formats).

    Returns:
        Dicts are :class:`Table`, objects with attributes :class:`Object`, tensors :class:`TensorView`, NumPy scalars Python's.

    Raises:
        CheckpointError: a file that is truncated or malformed, names anything that no snapshot holds (the message says what),
            declares sizes beyond its own, or has more objects than a network has.
    """
    return _read(view, Budget(MAX_OPCODES), nested=False)


def map_file(path: Path) -> memoryview:
    """A file's bytes, fetched as they are used. Raises CheckpointError where there is no such file or it is empty."""
    if not path.is_file():
        raise CheckpointError("expected a file, found none")
    try:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"expected a file that can be read, got: {error}") from error


# What the names that may be called do. Each gets the budget and the file's arguments, and checks them itself.


def _ordered_dict(budget: Budget) -> Table:
    return Table()


def _set(budget: Budget, items: Any) -> list[Any]:
    if type(items) is not list:
        raise CheckpointError(f"builtins.set: expected a list, got {short(items)}")
    budget.spend(len(items))
    return list(items)


def _default_dict(budget: Budget, factory: Any) -> Table:
    if type(factory) is not _Global or factory.name not in _TYPES:
        raise CheckpointError(f"collections.defaultdict: expected a plain type, got {short(factory)}")
    return Table()


def _enum(budget: Budget, value: Any) -> str:
    if type(value) is not str:
        raise CheckpointError(f"timm.layers.format.Format: expected a string, got {short(value)}")
    return value


def _persistent_object(budget: Budget, meta: Any) -> Object:
    """``module_src`` is dropped here, unread."""
    what = "torch_utils.persistence"
    if type(meta) is not Table or len(meta) > 8:
        raise CheckpointError(
            f"{what}: expected a dict with type, version, module_src, class_name and state, got {short(meta)}"
        )
    fields = meta.as_dict(what)
    if fields.get("type") != "class":
        raise CheckpointError(f"{what}: expected type 'class', got {short(fields.get('type'))}")
    state = fields.get("state")
    return Object(plain_name(fields.get("class_name"), f"{what} class_name"), None if state is None else _state(budget, state))


def _state(budget: Budget, state: Any) -> Table:
    """An object's attributes: a dict of plain names."""
    if type(state) is not Table:
        raise CheckpointError(f"attributes: expected a dict, got {short(state)}")
    budget.spend(len(state))
    for key, _ in state:
        plain_name(key, "attributes")
    return state


def _load_from_bytes(budget: Budget, data: Any) -> Storage:
    if type(data) is not memoryview:
        raise CheckpointError(f"torch.storage._load_from_bytes: expected bytes, got {short(data)}")
    storage = _read(data, budget, nested=True)
    if type(storage) is not Storage:
        raise CheckpointError(f"torch.storage._load_from_bytes: expected a storage, got {short(storage)}")
    return storage


def _rebuild_tensor(
    budget: Budget, storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any
) -> TensorView:
    """Every element lies inside the storage, and there are no more of them than it has."""
    what = "torch._utils._rebuild_tensor_v2"
    shape, stride = _sizes(shape, f"{what} size"), _sizes(stride, f"{what} stride")
    if type(storage) is not Storage or type(offset) is not int or offset < 0 or len(stride) != len(shape):
        raise CheckpointError(f"{what}: expected a storage, an offset and as many strides as sizes, got others")
    if type(requires_grad) is not bool or hooks:
        raise CheckpointError(f"{what}: expected requires_grad and no hooks, got {short(requires_grad)} and {short(hooks)}")
    view = TensorView(storage, offset, shape, stride)
    # A 0 counts as 1: the sizes beside it may not be huge either. Elements that share memory would multiply what is read.
    if math.prod(n or 1 for n in shape) > max(1, view.extent) or view.extent > storage.length - offset:
        raise CheckpointError(
            f"{what}: expected a tensor inside its storage of {storage.length}, got {list(shape)} with strides {list(stride)} "
            f"from {offset}"
        )
    return view


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**48 for n in value):
        raise CheckpointError(f"{what}: expected up to {_MAX_DIMENSIONS} sizes, got {short(value)}")
    return value


def _rebuild_parameter(budget: Budget, data: Any, requires_grad: Any, hooks: Any) -> TensorView:
    if type(data) is not TensorView or type(requires_grad) is not bool or hooks:
        raise CheckpointError("torch._utils._rebuild_parameter: expected a tensor, requires_grad and no hooks, got others")
    return data


def _numpy_dtype(budget: Budget, code: Any, align: Any, copy: Any) -> NumpyType:
    if type(code) is not str or code not in _NUMPY:
        raise CheckpointError(f"numpy.dtype: expected one of {list(_NUMPY)}, got {short(code)}")
    return NumpyType(code)


def _numpy_scalar(budget: Budget, dtype: Any, data: Any) -> bool | int | float:
    if type(dtype) is not NumpyType or type(data) is not memoryview:
        raise CheckpointError("numpy scalar: expected a dtype and its bytes, got others")
    form = struct.Struct(dtype.order + _NUMPY[dtype.code])
    if len(data) != form.size:
        raise CheckpointError(f"numpy scalar: expected {form.size} bytes, got {len(data)}")
    return form.unpack(data)[0]


#: Types that OmegaConf's records name, and that nothing here makes anything of; as protocol 2 names them too.
_TYPES = {"typing.Any", "__builtin__.unicode"}
_TYPES |= {f"{place}.{name}" for place in ("builtins", "__builtin__") for name in _BUILTINS}
_GLOBALS: dict[str, Any] = {
    **_DTYPES,
    **{name: _Global(name) for name in _TYPES},
    **{name: _Global(name, new=partial(Object, name)) for name in (*OMEGACONF, *_OMEGACONF_METADATA)},
    **{
        entry.name: entry
        for entry in (
            _Global("collections.OrderedDict", 0, _ordered_dict),
            _Global("collections.defaultdict", 1, _default_dict),
            _Global("dnnlib.util.EasyDict", new=Table),
            _Global("builtins.set", 1, _set),
            _Global("__builtin__.set", 1, _set),  # as protocol 2 names it, inside of torch.save's files
            _Global("timm.layers.format.Format", 1, _enum),
            _Global("torch_utils.persistence._reconstruct_persistent_obj", 1, _persistent_object),
            _Global("torch.storage._load_from_bytes", 1, _load_from_bytes),
            _Global("torch._utils._rebuild_tensor_v2", 6, _rebuild_tensor),
            _Global("torch._utils._rebuild_parameter", 3, _rebuild_parameter),
            _Global("numpy.dtype", 3, _numpy_dtype),
            _Global("numpy.core.multiarray.scalar", 2, _numpy_scalar),
            _Global("numpy._core.multiarray.scalar", 2, _numpy_scalar),
        )
    },
}


def _global(module: Any, name: Any, nested: bool) -> Any:
    """What stands for a global here. Raises CheckpointError, with its name, for any that no snapshot holds."""
    if type(module) is not str or type(name) is not str:
        raise CheckpointError(f"global: expected two strings, got {short(module)} and {short(name)}")
    full = f"{module}.{name}"
    if full in _STORAGES:
        return _STORAGES[full]
    if not nested and full in _GLOBALS:
        return _GLOBALS[full]
    if not nested and len(full) <= 256 and _MODULE_CLASS.fullmatch(full):
        return _Global(full, new=lambda: Object(name))
    where = "a storage" if nested else "a snapshot"
    raise CheckpointError(f"refused: the file names {short(full)}, which {where} has no use for; nothing was called")


class _Machine:
    """Runs pickles that lie one after the other in ``view``, from ``position`` on."""

    def __init__(self, view: memoryview, budget: Budget, nested: bool) -> None:
        self.view, self.budget, self.nested = view, budget, nested
        self.position = 0
        #: Resolves a persistent id, in a file of torch.save.
        self.persistent: Callable[[Any], Storage] | None = None
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        """The next pickle's object."""
        self.stack, self.marks, self.memo = [], [], []
        if self.take(1)[0] != 0x80 or not 2 <= self.take(1)[0] <= 5:
            raise CheckpointError("expected a pickle of protocol 2 to 5, got something else")
        while True:
            self.budget.spend(1)
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                value = self.pop()
                if self.stack or self.marks:
                    raise CheckpointError(f"malformed pickle: objects left over at byte {self.position}")
                return value
            step = _STEPS.get(code)
            if step is None:
                raise CheckpointError(f"expected the opcodes of a snapshot, got {code:#04x} at byte {self.position - 1}")
            step(self)

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes, as a view."""
        start = self.position
        if count > len(self.view) - start:
            raise CheckpointError(f"truncated: expected {count} bytes at byte {start}, got {len(self.view) - start}")
        self.position = start + count
        return self.view[start : start + count]

    def integer(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> str:
        """Text up to the end of the line (protocols 2 and 3 write globals so)."""
        end = bytes(self.view[self.position : self.position + 256]).find(b"\n")
        if end < 0:
            raise CheckpointError(f"malformed pickle: a global without an end at byte {self.position}")
        text = _decode(self.take(end))
        self.take(1)
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)  # looked up now: pop_mark, whose result this may be, replaces the stack

    def pop(self) -> Any:
        if not self.stack:
            raise CheckpointError(f"malformed pickle: an empty stack at byte {self.position}")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        if not self.marks:
            raise CheckpointError(f"malformed pickle: no mark at byte {self.position}")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def top(self, kind: type, what: str) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise CheckpointError(f"malformed pickle: expected {what} at byte {self.position}")
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def text(self, size: int) -> None:
        count = self.integer(size)
        if count > MAX_TEXT:
            raise CheckpointError(f"string: expected at most {MAX_TEXT} bytes, got {count}")
        self.push(_decode(self.take(count)))

    def frame(self) -> None:
        """A frame says how much a reader should fetch at once, which is of no use here."""
        count = self.integer(8)
        if count > len(self.view) - self.position:
            raise CheckpointError(f"truncated: expected a frame of {count} bytes, got {len(self.view) - self.position}")

    def long(self) -> None:
        count = self.integer(1)
        if count > 16:
            raise CheckpointError(f"integer: expected at most 16 bytes, got {count}")
        self.push(self.integer(count, signed=True))

    def make_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def extend(self) -> None:
        items = self.pop_mark()
        self.top(list, "a list").extend(items)

    def append(self) -> None:
        item = self.pop()
        self.top(list, "a list").append(item)

    def set_items(self) -> None:
        items = self.pop_mark()
        if len(items) % 2:
            raise CheckpointError(f"malformed pickle: a key without a value at byte {self.position}")
        self.top(Table, "a dict").extend(zip(items[::2], items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.top(Table, "a dict").append((key, value))

    def put(self, index: int) -> None:
        if index != len(self.memo) or not self.stack:
            raise CheckpointError(f"malformed pickle: expected memo {len(self.memo)}, got {index} at byte {self.position}")
        self.memo.append(self.stack[-1])

    def get(self, size: int) -> None:
        index = self.integer(size)
        if index >= len(self.memo):
            raise CheckpointError(f"malformed pickle: expected a memo below {len(self.memo)}, got {index}")
        self.push(self.memo[index])

    def find(self) -> None:
        self.push(_global(self.line(), self.line(), self.nested))

    def find_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(_global(module, name, self.nested))

    def reduce(self) -> None:
        """REDUCE: only of what the table says may be called, and by our own function for it."""
        args, callee = self.operands()
        if callee.call is None:
            raise CheckpointError(f"refused: the file calls {callee.name}, which no snapshot calls; nothing was called")
        if len(args) != callee.arguments:
            raise CheckpointError(f"{callee.name}: expected {callee.arguments} arguments, got {len(args)}")
        self.push(callee.call(self.budget, *args))

    def new_object(self) -> None:
        """NEWOBJ: an empty stand-in."""
        args, callee = self.operands()
        if callee.new is None or args:
            raise CheckpointError(f"refused: the file makes an instance of {callee.name}, which no snapshot does")
        self.push(callee.new())

    def operands(self) -> tuple[tuple[Any, ...], _Global]:
        args, callee = self.pop(), self.pop()
        if type(callee) is not _Global or type(args) is not tuple:
            raise CheckpointError(f"refused: the file calls {short(callee)} with {short(args)}; nothing was called")
        return args, callee

    def build(self) -> None:
        """BUILD: the attributes of an :class:`Object`, once, or the byte order of a NumPy dtype."""
        state, target = self.pop(), self.stack[-1] if self.stack else None
        if type(target) is Object and target.state is None:
            target.state = _state(self.budget, state)
        elif type(target) is NumpyType and type(state) is tuple and len(state) == 8 and state[1] in ("<", ">", "|", "="):
            target.order = "<" if state[1] in ("|", "=") else state[1]
        else:
            raise CheckpointError(f"refused: the file sets attributes of {short(target)} from {short(state)}")

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise CheckpointError("persistent id: expected none in a plain pickle, got one")
        self.push(self.persistent(self.pop()))


def _decode(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"string: expected UTF-8, got: {error.reason}") from error


_STEPS: dict[int, Callable[[_Machine], object]] = {
    0x28: _Machine.mark,
    0x29: lambda m: m.push(()),
    0x30: _Machine.pop,  # POP
    0x31: _Machine.pop_mark,  # POP_MARK
    0x42: lambda m: m.push(m.take(m.integer(4))),  # BINBYTES
    0x43: lambda m: m.push(m.take(m.integer(1))),
    0x47: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    0x4A: lambda m: m.push(m.integer(4, signed=True)),
    0x4B: lambda m: m.push(m.integer(1)),
    0x4D: lambda m: m.push(m.integer(2)),
    0x4E: lambda m: m.push(None),
    0x51: _Machine.persistent_id,
    0x52: _Machine.reduce,  # REDUCE
    0x58: lambda m: m.text(4),
    0x5D: lambda m: m.push([]),
    0x61: _Machine.append,
    0x62: _Machine.build,
    0x63: _Machine.find,  # GLOBAL
    0x65: _Machine.extend,  # APPENDS
    0x68: lambda m: m.get(1),
    0x6A: lambda m: m.get(4),
    0x71: lambda m: m.put(m.integer(1)),
    0x72: lambda m: m.put(m.integer(4)),
    0x73: _Machine.set_item,
    0x74: lambda m: m.push(tuple(m.pop_mark())),
    0x75: _Machine.set_items,
    0x7D: lambda m: m.push(Table()),
    0x81: _Machine.new_object,  # NEWOBJ
    0x85: lambda m: m.make_tuple(1),
    0x86: lambda m: m.make_tuple(2),
    0x87: lambda m: m.make_tuple(3),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x8A: _Machine.long,
    0x8C: lambda m: m.text(1),
    0x8D: lambda m: m.text(8),
    0x8E: lambda m: m.push(m.take(m.integer(8))),  # BINBYTES8
    0x8F: lambda m: m.push([]),  # EMPTY_SET: a list here, so that nothing is hashed
    0x90: _Machine.extend,  # ADDITEMS
    0x91: lambda m: m.push(m.pop_mark()),  # FROZENSET
    0x93: _Machine.find_on_stack,  # STACK_GLOBAL
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    0x95: _Machine.frame,
}


def _read(view: memoryview, budget: Budget, nested: bool) -> Any:
    """A plain pickle, or either format of torch.save. ``nested``: one storage, the only thing that a snapshot holds so."""
    if bytes(view[:4]) == b"PK\x03\x04":
        return _read_zip(view, budget, nested)
    machine = _Machine(view, budget, nested)
    value = machine.run()
    if type(value) is int and value == _LEGACY_MAGIC:
        value = _read_legacy(machine)
    if machine.position != len(view):
        raise CheckpointError(
            f"expected the end of the file at byte {machine.position}, got {len(view) - machine.position} more"
        )
    return value


def _storage_id(pid: Any) -> tuple[str, torch.dtype, int]:
    """Key, dtype and length of ("storage", type, key, device, length[, None])."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or (len(pid) == 6 and pid[5] is not None):
        raise CheckpointError(f"persistent id: expected a storage's, got {short(pid)}")
    _, dtype, key, _, length = pid[:5]
    if type(dtype) is not torch.dtype or type(key) is not str or type(length) is not int or length < 0:
        raise CheckpointError("persistent id: expected a type, a name and a length, got others")
    return key, dtype, length


def _read_legacy(machine: _Machine) -> Any:
    """torch.save's old format after its magic number: three pickles about the file, the object, the names of the storages that
    follow; each as its length and its bytes."""
    version, system = machine.run(), machine.run()
    little = system.as_dict("torch file").get("little_endian") if type(system) is Table and len(system) < 16 else None
    if type(version) is not int or version != _LEGACY_VERSION or little is not True:
        raise CheckpointError("torch file: expected version 1001, written on a little-endian machine, got another")
    storages: dict[str, Storage] = {}

    def declared(pid: Any) -> Storage:
        key, dtype, length = _storage_id(pid)
        storage = storages.setdefault(key, Storage(dtype, length))
        if (storage.dtype, storage.length) != (dtype, length):
            raise CheckpointError(f"storage {short(key)}: expected one dtype and length, got two")
        return storage

    machine.persistent = declared
    value = machine.run()
    machine.persistent = None
    keys = machine.run()
    if type(keys) is not list or any(type(key) is not str or key not in storages for key in keys):
        raise CheckpointError("torch file: expected the names of its storages, got others")
    for key in keys:
        storage, length = storages[key], machine.integer(8)
        if length != storage.length or storage.data is not None:
            raise CheckpointError(f"storage {short(key)}: expected {storage.length} elements once, got {length}")
        storage.data = machine.take(length * storage.dtype.itemsize)
    if any(storage.data is None for storage in storages.values()):
        raise CheckpointError("torch file: expected the data of every storage, got fewer")
    return value


def _read_zip(view: memoryview, budget: Budget, nested: bool) -> Any:
    """torch.save's new format: a zip of uncompressed records ``NAME/data.pkl``, ``NAME/data/KEY`` and a few more."""
    records = _zip_records(view, budget)
    prefix = next((name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")), None)
    if prefix is None or bytes(records.get(f"{prefix}byteorder", b"little")) != b"little":
        raise CheckpointError("torch file: expected a zip with data.pkl, written on a little-endian machine, got another")
    storages: dict[str, Storage] = {}

    def record(pid: Any) -> Storage:
        key, dtype, length = _storage_id(pid)
        data = records.get(f"{prefix}data/{key}")
        if data is None or len(data) != length * dtype.itemsize:
            raise CheckpointError(f"storage {short(key)}: expected {length} elements of {dtype}, got another record or none")
        storage = storages.setdefault(key, Storage(dtype, length))
        if storage.dtype != dtype:
            raise CheckpointError(f"storage {short(key)}: expected one dtype, got two")
        storage.data = data
        return storage

    machine = _Machine(records[f"{prefix}data.pkl"], budget, nested)
    machine.persistent = record
    return machine.run()


def _zip_records(view: memoryview, budget: Budget) -> Mapping[str, memoryview]:
    """Name -> bytes of a zip without comment and compression; ``zipfile`` would keep whatever a directory declares."""
    records: dict[str, memoryview] = {}
    try:
        end, count, size, start = struct.unpack("<4s6xHIIxx", view[-22:])
        if end != b"PK\x05\x06":
            raise CheckpointError("zip: expected its directory at the end of the file, got none")
        budget.spend(count)
        directory = view[start : start + size]
        for _ in range(count):
            head = struct.unpack("<4s6xH8xIIHHH8xI", directory[:46])
            mark, method, stored, length, name_size, extra, comment, offset = head
            if mark != b"PK\x01\x02" or method != 0 or stored != length:
                raise CheckpointError("zip: expected uncompressed records, got others")
            name = _decode(directory[46 : 46 + name_size])
            directory = directory[46 + name_size + extra + comment :]
            local, local_name, local_extra = struct.unpack("<4s22xHH", view[offset : offset + 30])
            first = offset + 30 + local_name + local_extra
            if local != b"PK\x03\x04" or first + length > len(view) or name in records:
                raise CheckpointError(f"zip: expected record {short(name)} inside the file, once, got another")
            records[name] = view[first : first + length]
    except struct.error as error:
        raise CheckpointError("zip: expected a whole directory, got a truncated one") from error
    return records
