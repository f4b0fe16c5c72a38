"""Pickles of plain data, read without running them: the opcodes that build containers and numpy arrays, and no others.

A pickle is a program that may name any function. Here the program is stepped through by hand; the only names it may use stand
for the parts of a stored numpy array, and no function of Python or numpy is called for it.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

_MARK = object()
_PUSHED = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG1"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("SHORT_BINUNICODE", "BINUNICODE"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_IGNORED = {"PROTO", "FRAME"}
_RECONSTRUCT = {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"}
_FROM_BUFFER = {"numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"}
_NAMES = {*_RECONSTRUCT, *_FROM_BUFFER, "numpy ndarray", "numpy dtype", "_codecs encode"}


@dataclass
class _Name:
    text: str


@dataclass
class _Dtype:
    code: str


@dataclass
class _Array:
    array: np.ndarray | None = None


def read_pickle(content: bytes, name: str) -> Any:
    """What a pickle of dicts, lists, tuples, ints, bools, None, bytes, text and uint8 or integer numpy arrays holds.

    The strings of Python 2 come back as bytes.

    Raises:
        ValueError: a broken pickle, or one that asks for anything else.
    """
    try:
        return _run(content)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, RecursionError) as error:
        raise ValueError(f"data: expected a pickle of plain data, got {name}: {error}") from error


def _run(content: bytes) -> Any:
    stack: list[Any] = []
    argument: Any
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(content):
        op = opcode.name
        if op in _PUSHED:
            stack.append(argument)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in ("BINSTRING", "SHORT_BINSTRING"):
            stack.append(argument.encode("latin-1"))
        elif op == "MARK":
            stack.append(_MARK)
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[op]())
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(_take(stack, int(op[-1]))))
        elif op == "TUPLE":
            stack.append(tuple(_take_to_mark(stack)))
        elif op in ("APPEND", "APPENDS"):
            items = _take(stack, 1) if op == "APPEND" else _take_to_mark(stack)
            _expect(stack[-1], list).extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = _take(stack, 2) if op == "SETITEM" else _take_to_mark(stack)
            _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op == "GLOBAL":
            stack.append(_name(argument))
        elif op == "STACK_GLOBAL":
            stack.append(_name(" ".join(_expect(part, str) for part in _take(stack, 2))))
        elif op == "REDUCE":
            function, arguments = _take(stack, 2)
            stack.append(_call(_expect(function, _Name).text, _expect(arguments, tuple)))
        elif op == "BUILD":
            (state,) = _take(stack, 1)
            _build(stack[-1], _expect(state, tuple))
        elif op == "STOP":
            (result,) = _take(stack, 1)
            return _finished(result)
        elif op not in _IGNORED:
            raise ValueError(f"the opcode {op}")
    raise ValueError("no end")


def _take(stack: list[Any], count: int) -> list[Any]:
    items = stack[-count:]
    if len(items) < count or any(item is _MARK for item in items):
        raise ValueError("too few items")
    del stack[-count:]
    return items


def _take_to_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _name(text: str) -> _Name:
    if text not in _NAMES:
        raise ValueError(f"the name {text!r}")
    return _Name(text)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    if name in _RECONSTRUCT:  # of (ndarray, (0,), b"b"): an empty array, filled by BUILD
        return _Array()
    if name in _FROM_BUFFER:  # of (bytes, dtype, shape, order): what protocol 5 has instead
        raw, dtype, shape, order = arguments
        return _Array(_array(raw, dtype, shape, order == "F"))
    if name == "numpy dtype":
        code = arguments[0].decode() if type(arguments[0]) is bytes else _expect(arguments[0], str)
        if code not in ("u1", "i4", "i8"):
            raise ValueError(f"an array of {code!r}")
        return _Dtype(code)
    if name == "_codecs encode" and arguments[1:] == ("latin1",):  # how Python 3 writes bytes for Python 2
        return _expect(arguments[0], str).encode("latin-1")
    raise ValueError(f"a call of {name}")


def _build(target: Any, state: tuple[Any, ...]) -> None:
    if type(target) is _Dtype:
        if state[1] in (">", b">"):
            raise ValueError("an array of big-endian numbers")
        return
    shape, dtype, fortran, raw = _expect(state, tuple)[1:]
    _expect(target, _Array).array = _array(raw, dtype, shape, bool(fortran))


def _array(raw: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
    content = raw if type(raw) is bytes else _expect(raw, bytearray)
    array = np.frombuffer(content, np.dtype(_expect(dtype, _Dtype).code).newbyteorder("<"))
    return array.reshape(_expect(shape, tuple), order="F" if fortran else "C")


def _finished(value: Any) -> Any:
    """The value with the arrays for their stand-ins, at the top and in the dict or list there."""
    if type(value) is _Array:
        if value.array is None:
            raise ValueError("an array without content")
        return value.array
    if type(value) is dict:
        return {key: _finished(item) if type(item) is _Array else item for key, item in value.items()}
    if type(value) is list:
        return [_finished(item) if type(item) is _Array else item for item in value]
    return value
