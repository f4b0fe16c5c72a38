"""What a pickle holds, as JSON and bytes: ``python -I -S unpickling.py [KEY ...] < FILE``, the standard library alone.

:mod:`imm.pickles` starts this process and believes nothing that comes back. The system limits it before it reads a file
(:func:`confine`). Nothing that a file names is imported or called, and no source text in it is looked at:

- A name becomes a stand-in of ``NAMES``, or a :class:`Record` where it is a module's class; any other name ends the reading.
  So all that a file can call (REDUCE, OBJ, INST) or make (NEWOBJ) is written here, and checks what it is given.
- Attributes (BUILD) go to a stand-in's ``__setstate__``, never to the object. Lists, dicts and the like have none to set.
"""

from __future__ import annotations

import codecs
import io
import json
import mmap
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

#: Bytes of the JSON. The published DiT-XL/2 has about a megabyte.
MAX_ANSWER = 1 << 24
#: No setting has as many characters; longer texts are left out.
MAX_TEXT = 1_000
#: Bytes of an element, by torch's name of the type.
ITEM = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
ITEM |= {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
#: What torch calls storages of them.
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
#: NumPy's codes -> struct's, and torch's types where an array may have them.
_NUMPY = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_NUMPY |= {"f2": "e", "f4": "f", "f8": "d"}
_ARRAYS = {"b1": "bool", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64", "u1": "uint8"}
_ARRAYS |= {"f2": "float16", "f4": "float32", "f8": "float64"}
#: Classes that a record stands for; OmegaConf's, of settings, keep their whole names.
_RECORDS = re.compile(
    r"(torch\.nn\.modules|timm\.layers|timm\.models)(\.[a-z][a-z0-9_]*)+\.[A-Z][A-Za-z0-9]*"
    r"|omegaconf\.(listconfig\.ListConfig|dictconfig\.DictConfig|base\.(Container)?Metadata)"
    r"|omegaconf\.nodes\.(Any|Boolean|Bytes|Float|Integer|String)Node"
)
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


class Refused(Exception):
    """What a file may not do, or not hold; one line."""


def short(value: Any) -> str:
    """The value on one short line, without walking it."""
    if type(value) is str:
        return repr(value[:80])
    if value is None or type(value) in (bool, float) or (type(value) is int and value.bit_length() <= 128):
        return repr(value)
    return value.name if isinstance(value, Inert) else f"a {type(value).__name__}"


def _check(holds: bool, what: str, *found: Any) -> None:
    if not holds:
        raise Refused(f"{what}, got {' and '.join(map(short, found)) or 'others'}")


class Inert:
    """Stands for what a file names, or makes of it: no file can call it or set its attributes, unless a subclass lets it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        raise Refused(f"refused: the file calls {self.name}, which no such file does; nothing was called")

    def __setstate__(self, state: Any) -> None:
        raise Refused(f"refused: the file sets attributes of {self.name}")


class Function(Inert):
    """A name that a file may call, and our own function for it."""

    __slots__ = ("count", "function")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function, self.count = name, function, function.__code__.co_argcount

    def __call__(self, *args: Any) -> Any:
        _check(len(args) == self.count, f"{self.name}: expected {self.count} arguments", len(args))
        return self.function(*args)


class Storage(Inert):
    """Elements of one type; ``data`` is None until they are found."""

    __slots__ = ("data", "dtype", "length")

    def __init__(self, dtype: str, length: int, data: Any = None) -> None:
        self.name, self.dtype, self.length, self.data = "a storage", dtype, length, data


class Tensor(Inert):
    """A view of a storage, whose bounds the parent checks. An array of NumPy is one that gets its storage later."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(self, storage: Storage | None = None, offset: int = 0, shape: Any = (), stride: Any = ()) -> None:
        self.name = "a tensor" if storage else "an array"
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def __setstate__(self, state: Any) -> None:
        if self.storage is not None or type(state) is not tuple or len(state) != 5:
            super().__setstate__(state)
        _, shape, dtype, fortran, raw = state
        self.fill(raw, dtype, shape, bool(fortran))

    def fill(self, raw: Any, dtype: Any, shape: Any, fortran: bool) -> Tensor:
        _check(type(dtype) is NumpyType and dtype.code in _ARRAYS, "expected an array of numbers", dtype)
        _check(dtype.order == "<", "expected an array of little-endian numbers", dtype)
        good = type(shape) is tuple and all(type(count) is int for count in shape) and type(raw) in (bytes, bytearray)
        _check(good, "expected an array's sizes and its bytes", shape, raw)
        stride, step = [], 1
        for count in shape if fortran else shape[::-1]:
            stride.append(step)
            step *= count
        size = ITEM[_ARRAYS[dtype.code]]
        _check(step * size == len(raw), f"expected an array of {step} elements", len(raw) // size)
        self.storage = Storage(_ARRAYS[dtype.code], step, raw)
        self.shape, self.stride = shape, stride if fortran else stride[::-1]
        return self


class NumpyType(Inert):
    """``numpy.dtype`` of one number."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.name, self.code, self.order = f"the type {code}", code, "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if type(state) is tuple and len(state) == 8 else None
        order = order.decode("latin-1") if type(order) is bytes else order
        if type(order) is not str or order not in ("<", ">", "|", "="):
            super().__setstate__(state)
        self.order = ">" if order == ">" else "<"


class _Class(type):
    """Of the classes that NEWOBJ makes instances of: they are not called, and do not change."""

    def __call__(cls, *args: Any) -> Any:
        raise Refused(f"refused: the file calls {cls.full}, which no such file does; nothing was called")  # type: ignore[attr-defined]

    def __setattr__(cls, name: str, value: Any) -> None:
        raise Refused("refused: the file sets attributes of a class")


class Record(Inert, metaclass=_Class):
    """Any object with attributes: the name of its class, and the dict that it got, once."""

    __slots__ = ("state",)
    state: Any
    full = name_of_new = ""

    def __new__(cls) -> Record:
        made: Record = object.__new__(cls)
        made.name, made.state = cls.name_of_new, None
        return made

    def __setstate__(self, state: Any) -> None:
        if self.state is not None:
            raise Refused(f"refused: the file sets attributes of {short(self.name)} twice")
        _check(type(state) is dict, "attributes: expected a dict", state)
        self.state = state


class EasyDict(Inert, metaclass=_Class):
    """A dict that is a class in the file."""

    __slots__ = ()
    full = "dnnlib.util.EasyDict"

    def __new__(cls) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


# What the names that may be called do, where it is more than to give back an argument.


def _empty_dict() -> dict[Any, Any]:
    return {}


def _default_dict(factory: Any) -> dict[Any, Any]:
    _check(type(factory) is Inert, "collections.defaultdict: expected a plain type", factory)
    return {}


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    _check(type(text) is str and encoding == "latin1", "_codecs.encode: expected text for latin1", text, encoding)
    return text.encode("latin-1")


def _persistent_object(meta: Any) -> Record:
    """``module_src``, which the original loader runs, is left where it is."""
    what = "torch_utils.persistence"
    _check(type(meta) is dict, f"{what}: expected a dict with type, version, module_src, class_name and state", meta)
    _check(meta.get("type") == "class", f"{what}: expected type 'class'", meta.get("type"))
    _check(type(meta.get("class_name")) is str, f"{what} class_name: expected a plain name", meta.get("class_name"))
    made = Record.__new__(Record)
    made.name = meta["class_name"]
    if meta.get("state") is not None:
        made.__setstate__(meta["state"])
    return made


def _load_from_bytes(data: Any) -> Storage:
    _check(type(data) is bytes, "torch.storage._load_from_bytes: expected bytes", data)
    storage = _read(io.BytesIO(data), memoryview(data), _NESTED)
    _check(type(storage) is Storage, "torch.storage._load_from_bytes: expected a storage", storage)
    return storage


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any) -> Tensor:
    good = type(storage) is Storage and type(shape) is type(stride) is tuple and not hooks
    what = "torch._utils._rebuild_tensor_v2: expected a storage, sizes, strides and no hooks"
    _check(good, what, storage, shape, stride, hooks)
    return Tensor(storage, offset, shape, stride)


def _numpy_dtype(code: Any, align: Any, copy: Any) -> NumpyType:
    code = code.decode("latin-1") if type(code) is bytes else code
    _check(type(code) is str and code in _NUMPY, f"numpy.dtype: expected one of {list(_NUMPY)}", code)
    return NumpyType(code)


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    _check(type(dtype) is NumpyType and type(data) is bytes, "numpy scalar: expected a dtype and its bytes", dtype, data)
    return struct.unpack(dtype.order + _NUMPY[dtype.code], data)[0]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": _default_dict,
    "builtins.set": lambda items: items,
    "__builtin__.set": lambda items: items,  # as protocol 2 names it
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",
    "timm.layers.format.Format": lambda text: text,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "numpy.dtype": _numpy_dtype,
}
for _place in ("numpy.core", "numpy._core"):
    _FUNCTIONS[f"{_place}.multiarray.scalar"] = _numpy_scalar
    _FUNCTIONS[f"{_place}.multiarray._reconstruct"] = lambda kind, shape, code: Tensor()  # which BUILD fills
    _FUNCTIONS[f"{_place}.numeric._frombuffer"] = lambda raw, kind, shape, order: Tensor().fill(raw, kind, shape, order == "F")
#: Names that nothing is made of: types, in OmegaConf's records and NumPy's arrays.
_TYPES = ["typing.Any", "__builtin__.long", "__builtin__.unicode", "numpy.ndarray"]
for _place in ("builtins", "__builtin__"):
    _TYPES += [f"{_place}.{_name}" for _name in ("bool", "dict", "float", "int", "list", "str", "tuple")]

#: All that a storage's own bytes may name.
_NESTED: dict[str, Any] = {f"torch.{name}Storage": Inert(dtype) for name, dtype in zip(_STORAGES, ITEM, strict=True)}
NAMES: dict[str, Any] = {
    **_NESTED,
    **{f"torch.{dtype}": Inert(f"torch.{dtype}") for dtype in ITEM},
    **{name: Inert(name) for name in _TYPES},
    **{name: Function(name, function) for name, function in _FUNCTIONS.items()},
    "dnnlib.util.EasyDict": EasyDict,
}


class _Reader(pickle.Unpickler):
    """The reader of C, that finds stand-ins. The strings of Python 2 are bytes."""

    def __init__(self, source: Any, names: dict[str, Any], storage: Callable[[Any], Storage] | None = None) -> None:
        super().__init__(source, encoding="bytes")
        self.names, self.storage = names, storage

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        found = self.names.get(full)
        if found is None and self.names is NAMES and len(full) <= 256 and _RECORDS.fullmatch(full):
            of_new = full if full.startswith("omegaconf") else name
            found = NAMES[full] = _Class("Record", (Record,), {"__slots__": (), "full": full, "name_of_new": of_new})
        if found is None:
            where = "a storage" if self.names is _NESTED else "it"
            raise Refused(f"refused: the file names {short(full)}, which {where} has no use for; nothing was called")
        return found

    def persistent_load(self, pid: Any) -> Storage:
        if self.storage is None:
            raise Refused("persistent id: expected none in a plain pickle, got one")
        return self.storage(pid)


def _read(source: Any, view: memoryview, names: dict[str, Any]) -> Any:
    """A plain pickle, or either format of torch.save. ``source`` reads what is in ``view``."""
    if bytes(view[:4]) == b"PK\x03\x04":
        return _read_zip(source, view, names)
    if len(view) < 2 or view[0] != 0x80 or not 2 <= view[1] <= 5:
        raise Refused("expected a pickle of protocol 2 to 5, got something else")
    value = _Reader(source, names).load()
    if type(value) is int and value == _LEGACY_MAGIC:
        value = _read_legacy(source, view, names)
    if source.tell() != len(view):
        raise Refused(f"expected the end of the file at byte {source.tell()}, got {len(view) - source.tell()} more")
    return value


def _storage_id(pid: Any) -> tuple[str, str, int]:
    """Key, type and length of ("storage", type, key, device, length[, None])."""
    good = type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage" and pid[5:] in ((), (None,))
    _check(good, "persistent id: expected a storage's", pid)
    _, kind, key, _, length = pid[:5]
    good = type(kind) is Inert and kind.name in ITEM and type(key) is str and type(length) is int and length >= 0
    _check(good, "persistent id: expected a type, a name and a length", kind, key, length)
    return key, kind.name, length


def _read_legacy(source: Any, view: memoryview, names: dict[str, Any]) -> Any:
    """torch.save's old format after its magic number: three pickles about the file, the object, the names of the storages that
    follow; each as its length and its bytes."""
    version, system = (_Reader(source, {}).load() for _ in range(2))
    good = version == _LEGACY_VERSION and type(system) is dict and system.get("little_endian") is True
    _check(good, "torch file: expected version 1001, written on a little-endian machine")
    storages: dict[str, Storage] = {}

    def declared(pid: Any) -> Storage:
        key, dtype, length = _storage_id(pid)
        storage = storages.setdefault(key, Storage(dtype, length))
        _check((storage.dtype, storage.length) == (dtype, length), f"storage {short(key)}: expected one dtype and length")
        return storage

    value, keys = _Reader(source, names, declared).load(), _Reader(source, {}).load()
    good = type(keys) is list and all(type(key) is str for key in keys) and {*keys} == {*storages}
    _check(good, "torch file: expected the names of its storages")
    for key in keys:
        storage, begin = storages[key], source.tell() + 8
        (length,) = struct.unpack("<q", source.read(8))
        good = length == storage.length and storage.data is None
        _check(good, f"storage {short(key)}: expected {storage.length} elements once", length)
        end = begin + length * ITEM[storage.dtype]
        if end > len(view):
            raise Refused(f"truncated: expected {end - begin} bytes at byte {begin}, got {len(view) - begin}")
        storage.data = view[begin:end]
        source.seek(end)
    return value


def _read_zip(source: Any, view: memoryview, names: dict[str, Any]) -> Any:
    """torch.save's new format: a zip of uncompressed records ``NAME/data.pkl``, ``NAME/data/KEY`` and a few more."""
    records: dict[str, memoryview] = {}
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            good = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size and not info.flag_bits & 1
            _check(good and info.filename not in records, "zip: expected uncompressed records, each once", info.filename)
            mark, *sizes = struct.unpack("<4s22xHH", view[info.header_offset : info.header_offset + 30])
            begin = info.header_offset + 30 + sum(sizes)
            data = records[info.filename] = view[begin : begin + info.file_size]
            _check(mark == b"PK\x03\x04" and len(data) == info.file_size, "zip: expected whole records", info.filename)
    prefix = next((name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")), None)
    good = prefix is not None and records.get(f"{prefix}byteorder", b"little") == b"little"
    _check(good, "torch file: expected a zip with data.pkl, written on a little-endian machine")
    storages: dict[str, Storage] = {}

    def record(pid: Any) -> Storage:
        key, dtype, length = _storage_id(pid)
        data = records.get(f"{prefix}data/{key}")
        good = data is not None and len(data) == length * ITEM[dtype]
        _check(good, f"storage {short(key)}: expected {length} elements of {dtype}")
        storage = storages.setdefault(key, Storage(dtype, length, data))
        _check(storage.dtype == dtype, f"storage {short(key)}: expected one dtype")
        return storage

    return _Reader(io.BytesIO(records[f"{prefix}data.pkl"]), names, record).load()


def _table(root: Any) -> tuple[list[Any], list[Storage]]:
    """The objects that ``root`` refers to, each once, and their storages: ``[NUMBER]`` refers to an object."""
    objects, numbers = [root], {id(root): 0}
    nodes: list[Any] = []
    storages: dict[int, tuple[int, Storage]] = {}

    def refer(value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, float) or (kind is str and len(value) <= MAX_TEXT):
            return value
        if kind is int:
            _check(value.bit_length() < 128, "integer: expected at most 16 bytes", (value.bit_length() + 8) // 8)
            return value
        number = numbers.setdefault(id(value), len(objects))
        if number == len(objects):
            objects.append(value)
        return [number]

    for value in objects:  # which grows meanwhile
        kind = type(value)
        if kind is dict:
            keys = [key.decode("latin-1") if type(key) is bytes else key for key in value]
            nodes.append(["dict", list(map(refer, keys)), list(map(refer, value.values()))])
        elif kind in (list, tuple, set, frozenset):
            nodes.append(["list", list(map(refer, value))])
        elif isinstance(value, Record):
            nodes.append(["record", value.name, refer(value.state)])
        elif kind is Tensor:
            storage = value.storage
            _check(storage is not None and storage.data is not None, "expected a tensor's elements in the file", value)
            number = storages.setdefault(id(storage), (len(storages), storage))[0]
            nodes.append(["tensor", number, value.offset, value.shape, value.stride])
        else:
            nodes.append(["type", value.name] if kind is Inert else ["other"])
    return nodes, [storage for _, storage in storages.values()]


def answer(source: Any, view: memoryview, keys: Sequence[str]) -> Iterator[Any]:
    """What a file holds, or the line that it is refused with: the length of some JSON, the JSON, and the storages' bytes.

    Args:
        source: reads the file. view: its bytes. keys: of a dict only these are kept, where there are any.
    """
    storages: list[Storage] = []
    try:
        value = _read(source, view, NAMES)
        if keys and type(value) is dict:
            value = {key: item for key, item in value.items() if key in keys or key in [one.encode() for one in keys]}
        nodes, storages = _table([value])
        text = json.dumps({"nodes": nodes, "storages": [(storage.dtype, storage.length) for storage in storages]})
        if len(text) > MAX_ANSWER:
            raise Refused("expected fewer objects than a network has, got more")
    except Refused as error:
        text, storages = json.dumps({"refused": str(error)[:2000]}), []
    except MemoryError:
        text, storages = json.dumps({"refused": "expected a file that fits in memory, got one that asks for more"}), []
    except Exception as error:  # of the reader of C, of zipfile, and of texts that are no UTF-8
        text = json.dumps({"refused": f"expected a whole pickle, got: {str(error)[:1000] or type(error).__name__}"})
        storages = []
    yield struct.pack("<Q", len(text))
    yield text.encode()
    for storage in storages:
        yield storage.data


def confine(size: int) -> None:
    """Have the system limit this process to what a file of that size needs; no file is opened or written after that."""
    import resource

    seconds = 10 + (size >> 26)
    limits = {"AS": (3 * size + (1 << 28),) * 2, "CPU": (seconds, seconds + 1), "NOFILE": (3, 3)}
    for name, pair in {**limits, "FSIZE": (0, 0), "NPROC": (0, 0), "CORE": (0, 0)}.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, pair if most == resource.RLIM_INFINITY else (min(pair[0], most), min(pair[1], most)))


def _main(keys: Sequence[str]) -> None:
    with mmap.mmap(0, 0, access=mmap.ACCESS_READ) as source:
        codecs.lookup("cp437")  # of names in zips; nothing can be imported later
        confine(len(source))
        for part in answer(source, memoryview(source), keys):
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        os._exit(0)  # views of the file may still be about


if __name__ == "__main__":
    _main(sys.argv[1:])
