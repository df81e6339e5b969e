"""Arrays in npy and npz files, which take no more memory than the file can hold."""

import zipfile
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format

EXPANSION = 100  # of a compressed file, at most


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
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damage
        kind = path.suffix.lower().removeprefix(".") or "npz"
        raise ValueError(
            f"`{path}` must be a complete {kind} file of numbers and strings. Got {error!s:.200}. Copy it again."
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
    count = prod(shape) * dtype.itemsize
    if count > size:
        raise ValueError(f"a header of shape {shape} for {size} bytes")
    return array_of(file.read(count), dtype, shape, fortran)


def array_of(
    data: bytes | bytearray, dtype: np.dtype, shape: tuple[int, ...], fortran: bool
) -> np.ndarray:
    """An array of numbers or strings, whose bytes are what they should be."""
    if dtype.kind not in "biufSU" or dtype.subdtype:
        raise ValueError(f"an array of {'objects' if dtype.hasobject else dtype}")
    if prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array whose shape is not that of its bytes")
    if dtype.kind == "U":
        letters = np.frombuffer(data, np.dtype("u4").newbyteorder(dtype.byteorder))
        if letters.max(initial=0) > 0x10FFFF:
            raise ValueError("a string of letters that do not exist")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
