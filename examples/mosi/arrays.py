"""Arrays in npy and npz files, which take no more memory than the file can hold."""

import zipfile
import zlib
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format

EXPANSION = 100  # of a compressed file, at most
DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)


def read_arrays(path: Path, fields: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a npz file, or the one of a npy file under the name of the file.

    Raises:
        ValueError: If it is damaged, holds anything but numbers and strings, lacks a field, or expands without measure.
    """
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        with path.open("rb") as file:
            size = path.stat().st_size
            if path.suffix.lower() == ".npy":
                return {path.stem: read_array(file, size)}
            arrays = {}
            with zipfile.ZipFile(file) as archive:
                entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                chosen = [name for name in entries if fields is None or name in fields]
                if sum(entries[name].file_size for name in chosen) > EXPANSION * size:
                    raise ValueError(f"arrays of more than {EXPANSION} times its size")
                for name in chosen:
                    with archive.open(entries[name]) as member:
                        arrays[name] = read_array(member, entries[name].file_size)
    except DAMAGE as error:
        kind = path.suffix.lower().removeprefix(".") or "npz"
        raise ValueError(
            f"`{path}` must be a complete {kind} file of numbers and strings. Got {error}. Copy it again."
        ) from error
    for name in fields or ():
        if name not in arrays:
            raise ValueError(
                f"`{path}` must hold the fields {list(fields)}. Got no {name!r}. Copy it again."
            )
    return arrays


def read_array(file: IO[bytes], size: int) -> np.ndarray:
    version = format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = format.read_array_header_2_0(file)
    if dtype.kind not in "biufSU":
        raise ValueError(f"an array of {'objects' if dtype.hasobject else dtype}")
    count = prod(shape) * dtype.itemsize
    if count > size:
        raise ValueError(f"a header of shape {shape} for {size} bytes")
    return np.frombuffer(file.read(count), dtype).reshape(shape, order="F" if fortran else "C")
