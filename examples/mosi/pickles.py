"""Pickles from strangers, read by the standard library's own recipe: `find_class` knows a few names, and runs none.

Before that, `screen` lets through only the opcodes that containers, strings, numbers and arrays need, and bounds what
the unpickler in C does not: the number of opcodes, the places of its memo, and the keys of dicts, as the hash of a
nested tuple recurses without bound.
"""

import pickle
import pickletools
from collections.abc import Callable
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from examples.mosi.arrays import array_of

MAX_OPCODES = 20_000_000  # MOSEI in the format of MAG-BERT takes about 2,000,000
STRINGS = (
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8"
)
OTHERS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 "
    "FLOAT BINFLOAT BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS "
    "EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET "
    "GLOBAL STACK_GLOBAL REDUCE BUILD"
)
KEYS = frozenset(STRINGS.split())
ALLOWED = KEYS.union(OTHERS.split())
STACK = {  # what each takes from the stack, and how much it leaves there
    opcode.name: ([item.name for item in opcode.stack_before], len(opcode.stack_after))
    for opcode in pickletools.opcodes
}


def load(path: Path) -> Any:
    """The content of a pickle: containers, strings, numbers and arrays.

    Raises:
        ValueError: If it asks for anything else, or is truncated; the message names what.
    """
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise ValueError("an empty file")
            with mmap(file.fileno(), 0, access=ACCESS_READ) as stream:
                screen(stream)
            file.seek(0)
            return Unpickler(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # a hostile stream can break any line, and never gets past it
        reason = (
            f"{error}" if isinstance(error, ValueError | pickle.UnpicklingError) else f"{error!r}"
        )
        raise ValueError(
            f"`{path}` must be a whole pickle of arrays, strings, numbers and containers. Got {reason[:200]}. "
            "Nothing in it was run; download it again, or from another source."
        ) from None


def screen(stream: Any) -> None:
    """Raises ValueError where an opcode is not in `ALLOWED`, or would take memory or time without bound."""
    keys: list[bool] = []  # the stack, of which is kept whether each object may be a key
    marks: list[int] = []
    memo: dict[int, bool] = {}
    for number, (opcode, argument, place) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if name not in ALLOWED or number == MAX_OPCODES:
            reason = f"opcode {name}" if number < MAX_OPCODES else f"more than {number} opcodes"
            raise ValueError(f"{reason} at byte {place}")
        if name == "MARK":
            marks.append(len(keys))
        elif name.endswith(("PUT", "MEMOIZE")):
            index = len(memo) if argument is None else int(argument)
            if not 0 <= index <= number:
                raise ValueError(f"place {index} of the memo at byte {place}")
            memo[index] = keys[-1]
        elif name.endswith("GET"):
            keys.append(memo[int(argument)])
        else:
            before, after = STACK[name]
            start = len(keys) - len(before)
            if "mark" in before:
                start = marks.pop() - before.index("mark")
            if start < 0:
                raise ValueError(f"an empty stack at byte {place}")
            taken = keys[start:]
            if name in ("DICT", "SETITEM", "SETITEMS") and not all(taken[name != "DICT" :: 2]):
                raise ValueError(f"a key that is no string at byte {place}")
            keys[start:] = [name in KEYS] * after


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if path not in CALLS:
            raise ValueError(f"the global {module}.{name}")
        return Call(CALLS[path])


class Call:
    """Stands for a function: calls one of this module in its place, and nothing can be set on it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state of something that is no array")


class Dtype:
    """Stands for a dtype of numbers or strings, or of objects (None)."""

    __slots__ = ("value",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or len(code) > 12:
            raise ValueError("dtype of a strange kind")
        self.value = None if code in ("O", "O8") else np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        """The state of numpy: (version, byte order, subdtype, names, fields, size, alignment, flags)."""
        _, order, *structure = state[:5]
        if any(part is not None for part in structure):
            raise ValueError("dtype with fields")
        if self.value is not None and order in ("<", ">"):
            self.value = self.value.newbyteorder(order)


class Array(np.ndarray):
    """An array that checks its content, which comes in a state of its own."""

    def __setstate__(self, state: Any) -> None:
        """The state of numpy: (version, shape, dtype, Fortran order, bytes, or a list for a dtype of objects)."""
        _, shape, dtype, fortran, data = state
        made = array(data, dtype, shape, "F" if fortran else "C")
        content = made.tolist() if made.dtype == object else made.tobytes("A")
        super().__setstate__((1, made.shape, made.dtype, bool(fortran), content))


def array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Array:
    shape = shape if isinstance(shape, tuple) else (shape,)
    if not all(isinstance(n, int) and n >= 0 for n in shape) or len(shape) > 8:
        raise ValueError("array of a strange shape")
    if not isinstance(dtype, Dtype):
        raise ValueError("array of a strange dtype")
    if dtype.value is None:
        strings = isinstance(data, list) and all(isinstance(item, str | bytes) for item in data)
        if not strings or shape != (len(data),):
            raise ValueError("array of objects that are not strings")
        made = np.empty(shape, object)
        made[:] = data
        return made.view(Array)
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray):
        raise ValueError("array without bytes")
    return array_of(data, dtype.value, shape, order == "F").view(Array)


def encode(text: Any, codec: Any) -> bytes:
    if not isinstance(text, str) or codec != "latin1":
        raise ValueError("codec other than latin1")
    return text.encode("latin1")


def never(*_: Any) -> None:
    raise ValueError("a call of something that is no function")


CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": Dtype,
    "numpy.ndarray": never,  # an argument of _reconstruct
    "numpy.core.multiarray._reconstruct": lambda *_: Array(0, np.int8),
    "numpy.core.multiarray.scalar": lambda dtype, data: array(data, dtype, ())[()],
    "numpy.core.numeric._frombuffer": array,
    "_codecs.encode": encode,
    "__builtin__.bytes": lambda: b"",  # of protocols 0 to 2
}
