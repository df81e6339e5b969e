"""Pickles from strangers, read without unpickling: a small machine that builds containers and arrays, and no more.

It runs the opcodes that numpy arrays, strings, numbers, lists, tuples and dicts need. A global is never imported: six
names of numpy and the codec of old protocols stand for functions written here, any other is refused by its name.
"""

import mmap
import pickletools
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

MAX_OPCODES = 20_000_000  # MOSEI in the format of MAG-BERT takes about 2,000,000
KEYS = (
    str,
    int,
    float,
    bool,
    bytes,
    type(None),
)  # flat: the hash of a nested tuple recurses without bound
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = (
    *(
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
    ),
    *(
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
    ),
    *("BINBYTES8", "BYTEARRAY8"),
)


class Array:
    """Stands for an array until its content arrives, then holds it."""

    value: Any = None

    def build(self, state: Any) -> None:
        """The state of numpy: (version, shape, dtype, Fortran order, bytes, or a list for a dtype of objects)."""
        _, shape, dtype, fortran, data = state
        self.value = array(data, dtype, shape, "F" if fortran else "C")


class Dtype:
    """Stands for a dtype of numbers or strings, or of objects (None)."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or len(code) > 12:
            raise ValueError("dtype of a strange kind")
        self.value = None if code in ("O", "O8") else np.dtype(code)
        if self.value is not None and (self.value.kind not in "biufUS" or self.value.subdtype):
            raise ValueError(f"dtype {code!r}")

    def build(self, state: Any) -> None:
        """The state of numpy: (version, byte order, subdtype, names, fields, size, alignment, flags)."""
        _, order, *structure = state[:5]
        if any(part is not None for part in structure):
            raise ValueError("dtype with fields")
        if self.value is not None and order in ("<", ">"):
            self.value = self.value.newbyteorder(order)


def array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    shape = shape if isinstance(shape, tuple) else (shape,)
    if (
        not isinstance(dtype, Dtype)
        or not all(isinstance(n, int) and n >= 0 for n in shape)
        or len(shape) > 8
    ):
        raise ValueError("array of a strange shape")
    if dtype.value is None:
        if (
            not isinstance(data, list)
            or not all(isinstance(item, str) for item in data)
            or shape != (len(data),)
        ):
            raise ValueError("array of objects that are not strings")
        return list(data)  # no array: one long string would set the width of all
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray) or prod(shape) * dtype.value.itemsize != len(data):
        raise ValueError("array whose shape is not that of its bytes")
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C")


def reconstruct(*_: Any) -> Array:
    return Array()


def frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    made = Array()
    made.value = array(data, dtype, shape, order)
    return made


def scalar(dtype: Any, data: Any) -> Any:
    return array(data, dtype, ())[()]


def encode(text: Any, codec: Any) -> bytes:
    if not isinstance(text, str) or codec != "latin1":
        raise ValueError("codec other than latin1")
    return text.encode("latin1")


CALLS: dict[str, Callable[..., Any] | None] = {
    "numpy.dtype": Dtype,
    "numpy.ndarray": None,  # an argument of _reconstruct, never called
    "_codecs.encode": encode,
    "__builtin__.bytes": lambda: b"",  # of protocols 0 to 2
} | {
    f"numpy.{core}.{name}": call
    for core in ("core", "_core")
    for name, call in {
        "multiarray._reconstruct": reconstruct,
        "multiarray.scalar": scalar,
        "numeric._frombuffer": frombuffer,
    }.items()
}


class Global(str):
    """The name of one of `CALLS`."""


def load(path: Path) -> Any:
    """The content of a pickle: containers, strings, numbers and read-only arrays.

    Raises:
        ValueError: If it asks for anything else, or is truncated; the message names what, and where.
    """
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise ValueError(
                f"`{path}` must be a whole pickle. Got an empty file. Download it again."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            place = 0
            machine = Machine()
            try:
                for number, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
                    place = position
                    if number == MAX_OPCODES:
                        raise ValueError(f"more than {MAX_OPCODES} opcodes")
                    machine.do(opcode.name, argument)
                return plain(machine.stack.pop())
            except Exception as error:  # a hostile stream can break any line of the machine, and never gets past it
                reason = (
                    error.args[0]
                    if isinstance(error, ValueError) and error.args
                    else type(error).__name__
                )
                raise ValueError(
                    f"`{path}` must be a whole pickle of arrays, strings, numbers and containers. "
                    f"Got {str(reason)[:200]} at byte {place}. Nothing in it was run; get the file from another source."
                ) from None


class Machine:
    """The stack of the pickle protocols 0 to 5, without their calls."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open mark
        self.memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.named(
                ".".join(map(str, self.take(2))) if argument is None else argument.replace(" ", ".")
            )
        elif name not in ("PROTO", "FRAME", "STOP"):
            act = getattr(self, name.lower(), None)
            if act is None:
                raise ValueError(f"opcode {name}")
            act()

    def take(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("an empty stack")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def named(self, name: str) -> None:
        if name not in CALLS:
            raise ValueError(f"the global {name}")
        self.stack.append(Global(name))

    def reduce(self) -> None:
        call, arguments = self.take(2)
        made = CALLS[call] if isinstance(call, Global) else None
        if made is None or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        self.stack.append(made(*arguments))

    def build(self) -> None:
        target, state = self.take(2)
        if not isinstance(target, Array | Dtype) or not isinstance(state, tuple):
            raise ValueError("a state of something that is no array")
        target.build(state)
        self.stack.append(target)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def above(self) -> list[Any]:
        """All since the last mark, which is gone then."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def empty_list(self) -> None:
        self.stack.append([])

    def empty_dict(self) -> None:
        self.stack.append({})

    def tuple1(self, count: int = 1) -> None:
        self.stack.append(tuple(value(item) for item in self.take(count)))

    def tuple2(self) -> None:
        self.tuple1(2)

    def tuple3(self) -> None:
        self.tuple1(3)

    def tuple(self) -> None:
        items = self.above()  # before `self.stack` is looked up: it changes
        self.stack.append(tuple(map(value, items)))

    def list(self) -> None:
        items = self.above()
        self.stack.append(list(map(plain, items)))

    def dict(self) -> None:
        items = self.above()
        self.stack.append({})
        self.put(items)

    def append(self) -> None:
        self.extend(self.take(1))

    def appends(self) -> None:
        self.extend(self.above())

    def setitem(self) -> None:
        self.put(self.take(2))

    def setitems(self) -> None:
        self.put(self.above())

    def extend(self, items: Sequence[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items of something that is no list")
        self.stack[-1].extend(map(plain, items))

    def put(self, items: Sequence[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise ValueError("keys of something that is no dict")
        for key, item in zip(items[::2], items[1::2], strict=True):
            if type(key) not in KEYS:
                raise ValueError(f"a key of type {type(key).__name__}")
            self.stack[-1][key] = plain(item)


def value(item: Any) -> Any:
    """The array in place of what stood for it."""
    if isinstance(item, Array):
        if item.value is None:
            raise ValueError("an array without content")
        return item.value
    return item


def plain(item: Any) -> Any:
    """The same for what ends in a list or dict, where globals and dtypes have no business."""
    if isinstance(item, Global | Dtype):
        raise ValueError(f"a {type(item).__name__.lower()} among the values")
    return value(item)
