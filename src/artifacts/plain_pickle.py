"""A custom interpreter that reads pickles of plain values.

``pickle.load`` runs any code that a file names, and restricting the names is not enough: numpy's array and dtype
accept a state that points anywhere in memory. This module executes only the few opcodes that plain values need.
Nothing is imported or called by name, and arrays are copied out of the file's bytes.
"""

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_DEPTH = 100  # nested containers
_BITS = 64  # maximum size of an integer: longer ones may not convert to float or print
_KEYS = {str, int, float, bool, type(None), bytes}  # no tuples: hashing deeply nested ones overflows the C stack
_LEAVES = {*_KEYS, complex}


class PlainPickleError(ValueError):
    """A pickle is damaged or contains more than plain values."""


@dataclass
class _Name:
    """A global that a pickle may name, and the function to run when the pickle calls it, if calls are allowed."""

    call: Callable[..., Any] | None = None


@dataclass
class _DType:
    """A numeric dtype; a later opcode sets the byte order."""

    kind: str
    size: str
    order: str = "="

    def build(self, state: Any) -> None:
        """Apply the state ``(version, byte order, None, None, None, -1, -1, flags)``."""
        if type(state) is not tuple or not 5 <= len(state) <= 9 or any(part is not None for part in state[2:5]):
            raise PlainPickleError("it contains an array of something other than numbers")
        if state[1] not in ("<", ">", "=", "|"):
            raise PlainPickleError("an array has no valid byte order")
        self.order = state[1]

    def array(self, data: Any, shape: Any = None, order: str = "C") -> np.ndarray:
        """Copy the numbers in ``data`` into an array in this machine's byte order."""
        if type(data) is str:  # bytes written by Python 2
            data = data.encode("latin-1")
        if type(data) not in (bytes, bytearray) or order not in ("C", "F"):
            raise PlainPickleError("an array has no valid data")
        if self.kind == "b":  # bytes other than 0 and 1 are not valid booleans
            values = np.frombuffer(data, np.uint8) != 0
        else:
            values = np.frombuffer(data, np.dtype(f"{self.order}{self.kind}{self.size}"))
            values = values.astype(values.dtype.newbyteorder("="))
        if shape is None:
            return values
        if type(shape) is not tuple or any(type(length) is not int or length < 0 for length in shape):
            raise PlainPickleError("an array has no valid shape")
        if math.prod(shape) != len(values):
            raise PlainPickleError(f"an array of shape {shape} has {len(values)} values")
        return values.reshape(shape, order=order)


@dataclass
class _Array:
    """An array whose content is set by a later opcode."""

    values: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Apply the state ``(version, shape, dtype, is Fortran order, data)``."""
        if type(state) is not tuple or len(state) not in (4, 5):
            raise PlainPickleError("an array has no valid content")
        shape, dtype, fortran, data = state[-4:]
        self.values = _dtype(dtype).array(data, shape, "F" if fortran else "C")


@dataclass
class _Namespace:
    """An argparse Namespace from an older file; it is read as a dict."""

    values: dict[Any, Any] = field(default_factory=dict)

    def build(self, state: Any) -> None:
        """Apply the attributes."""
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise PlainPickleError("a Namespace has attributes that are not plain values by name")
        self.values = state


def _dtype(value: Any) -> _DType:
    if type(value) is not _DType:
        raise PlainPickleError("an array has no dtype")
    return value


def _make_dtype(name: Any, *flags: Any) -> _DType:
    found = re.fullmatch(r"([biufc])(\d{1,2})", name, re.ASCII) if type(name) is str else None
    if found is None:
        raise PlainPickleError(f"it contains an array of {name!r:.40}, not of numbers")
    return _DType(found[1], found[2])


def _make_array(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _make_array_at_once(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    if order == "K":  # axes in storage order
        if type(axes) is not tuple or any(type(axis) is not int for axis in axes):
            raise PlainPickleError("an array has no order of axes")
        return _Array(_dtype(dtype).array(data, shape).transpose(axes))
    return _Array(_dtype(dtype).array(data, shape, order))


def _make_scalar(dtype: Any, data: Any) -> np.generic:
    (value,) = _dtype(dtype).array(data)
    return value


def _make_namespace(kind: Any = None, base: Any = None, state: Any = None) -> _Namespace:
    return _Namespace()


def _make_bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """Decode bytes as written by protocols 0 to 2."""
    if type(text) is not str or encoding != "latin1":
        raise PlainPickleError("it contains encoded text")
    return text.encode("latin-1")


def _make_complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise PlainPickleError("the parts of a complex number are not two floats")
    return complex(real, imaginary)


# Current module names; ``_global`` maps the names of Python 2 and numpy 1 to these.
_NAMES = {
    ("numpy", "dtype"): _Name(_make_dtype),
    ("numpy", "ndarray"): _Name(),
    ("numpy._core.multiarray", "_reconstruct"): _Name(_make_array),
    ("numpy._core.multiarray", "scalar"): _Name(_make_scalar),
    ("numpy._core.numeric", "_frombuffer"): _Name(_make_array_at_once),
    ("argparse", "Namespace"): _Name(_make_namespace),
    ("copyreg", "_reconstructor"): _Name(_make_namespace),
    ("builtins", "object"): _Name(),
    ("builtins", "bytes"): _Name(_make_bytes),
    ("builtins", "complex"): _Name(_make_complex),
    ("_codecs", "encode"): _Name(_make_bytes),
}
_PLACES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _global(module: Any, name: Any) -> _Name:
    if type(module) is not str or type(name) is not str:
        raise PlainPickleError("it refers to a global whose name is not text")
    place = _PLACES.get(module, re.sub(r"^numpy\.core\.", "numpy._core.", module))
    if (place, name) not in _NAMES:
        raise PlainPickleError(f"it names {module}.{name}, which is not plain data")
    return _NAMES[place, name]


_CODES = {code.code.encode("latin-1"): code for code in pickletools.opcodes}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {  # opcodes that push their argument
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_LONG = {"INT", "LONG", "LONG1", "LONG4"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load_plain(data: bytes) -> Any:
    """Read a pickle of any protocol: dicts, lists, tuples, numbers, text, bytes, numpy arrays and scalars.

    A Namespace is read as a dict.

    Raises:
        PlainPickleError: The pickle contains anything else.
        ValueError: The pickle is damaged. Other exceptions are possible (``TypeError``, ``IndexError``).
    """
    budget = 10 * len(data) + 10**5
    return _Plain(budget).of(_run(io.BytesIO(data), budget), 0)


def _run(file: io.BytesIO, budget: int) -> Any:
    """Execute the opcodes. The result may contain arrays and Namespaces that are not unwrapped yet.

    ``budget`` limits the bytes that calls may create, since a small file can reuse an argument many times.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stack below each mark
    memo: dict[int, Any] = {}
    while True:
        code = _CODES.get(file.read(1))
        if code is None:
            raise PlainPickleError("truncated, or not a pickle")
        name = code.name
        argument: Any = None if code.arg is None else code.arg.reader(file)
        if name in _VALUES:
            stack.append(argument)
            if name in _LONG and argument.bit_length() > _BITS:
                raise PlainPickleError("it contains a number of more than 64 bits")
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if type(function) is not _Name or function.call is None or type(arguments) is not tuple:
                raise PlainPickleError("it calls a function that does not create plain data")
            stack.append(function.call(*arguments))
            budget -= _size(stack[-1])
        elif name in _TUPLES:
            start = len(stack) - _TUPLES[name]
            if start < 0:
                raise PlainPickleError("truncated")
            stack[start:] = [tuple(stack[start:])]
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD"):
            if name.endswith("S"):
                items, stack = stack, below.pop()
            else:
                count = 2 if name == "SETITEM" else 1
                items = [stack.pop() for _ in range(count)][::-1]
            _change(name, stack[-1], items)
            budget -= _size(stack[-1]) if name == "BUILD" else 0
        elif name in ("TUPLE", "LIST", "DICT", "POP_MARK"):
            items, stack = stack, below.pop()
            if name == "DICT":
                stack.append({})
                _change("SETITEMS", stack[-1], items)
            elif name != "POP_MARK":
                stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "GLOBAL":
                place, thing = argument.split(" ", 1)
            else:
                thing, place = stack.pop(), stack.pop()
            stack.append(_global(place, thing))
        elif name == "NEWOBJ":
            arguments, kind = stack.pop(), stack.pop()
            if kind is not _NAMES["argparse", "Namespace"] or arguments != ():
                raise PlainPickleError("it contains an object that is not plain data")
            stack.append(_Namespace())
        elif name == "STOP":
            return stack.pop()
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME"):
            raise PlainPickleError(f"the opcode {name} creates something other than plain data")
        if budget < 0:
            raise PlainPickleError("it expands to much more data than it contains")


def _size(value: Any) -> int:
    """Size in bytes of an array, a numpy scalar, or bytes."""
    return len(value) if type(value) is bytes else getattr(getattr(value, "values", value), "nbytes", 0)


def _change(name: str, target: Any, items: list[Any]) -> None:
    """Add items to a list or dict, or apply a state to an array, dtype, or Namespace."""
    if name == "BUILD" and type(target) in (_Array, _DType, _Namespace):
        target.build(items[0])
    elif name in ("APPEND", "APPENDS") and type(target) is list:
        target.extend(items)
    elif name in ("SETITEM", "SETITEMS") and type(target) is dict and len(items) % 2 == 0:
        keys = items[::2]
        if not all(type(key) in _KEYS or isinstance(key, np.generic) for key in keys):
            raise PlainPickleError("a dict has keys other than numbers and text")
        target.update(zip(keys, items[1::2], strict=True))
    else:
        raise PlainPickleError(f"the opcode {name} changes something other than plain data")


@dataclass
class _Plain:
    """Unwraps a value and refuses anything but plain values.

    Attributes:
        budget: The number of values that may still follow. Nested lists that repeat one object are small in the file
            but can have any size when traversed.
    """

    budget: int

    def of(self, value: Any, depth: int) -> Any:
        """Return the plain value."""
        kind = type(value)
        self.budget -= 1
        if self.budget < 0 or depth > _DEPTH:
            raise PlainPickleError("it refers to itself or is nested too deeply")
        if kind in _LEAVES:
            if kind is str or kind is bytes:
                self.budget -= len(value) // 8
            return value
        if kind is list or kind is tuple:
            return kind([self.of(item, depth + 1) for item in value])
        if kind is _Namespace:
            return self.of(value.values, depth + 1)
        if kind is dict:
            self.budget -= len(value)
            return {key: self.of(item, depth + 1) for key, item in value.items()}
        if kind is _Array and value.values is not None:
            self.budget -= value.values.size
            return value.values
        if isinstance(value, np.generic):
            return value
        raise PlainPickleError("it contains something other than plain data")
