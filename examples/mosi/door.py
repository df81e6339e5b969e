"""Which data is meant, and which reader it needs: by its content, whatever its name."""

import os
import zipfile
from pathlib import Path

from examples.mosi import files, own, published
from examples.mosi.data import Corpus, cache_folder
from examples.mosi.simulated import simulate

KINDS = (
    f"a folder with {own.UTTERANCES}, {files.UTTERANCES} or mosi.pkl, or such a file, or another pickle "
    "(of MAG-BERT, MMSA, or your own)"
)
MAGIC = {
    b"\x93NUMPY": "one array, without texts and labels",
    b"\x89HDF\r\n": "an HDF5 file, as h5 and csd are",
    b"\x1f\x8b": "a gzip file",
}
BESIDE = Path(__file__).resolve().parents[3] / "shared/data"
PICKLES = (b"\x80", b"(", b"]", b"}")


def find(data: str, split: str) -> Corpus:
    """The corpus at `data`: what was asked for, or a refusal; a simulation only where nothing was asked for or found."""
    name, place = "data", data
    if data == "auto" and os.environ.get("GRADBALANCE_DATA"):
        name, place = "GRADBALANCE_DATA", os.environ["GRADBALANCE_DATA"]
    kind, colon, share = place.partition(":")
    if kind == "simulated":
        if colon and not (share.isdecimal() and 1 <= int(share) <= 100):
            raise ValueError(
                f"`{name}` must be simulated, or simulated:N with N from 1 to 100. Got {place}. Choose such a share."
            )
        return simulate(share=int(share or 1))
    if place != "auto":
        return read(Path(place), split, name)
    places = [cache_folder(), BESIDE]
    for folder in places:
        if found_in(folder):
            return read(folder, split, name)
    looked = " or ".join(map(str, places))
    return simulate(why=f"no real data in {looked}; fetch it: python -m examples.mosi.download")


def found_in(folder: Path) -> Path | None:
    """The first file of data in a folder, be it a broken link."""
    for name in (own.UTTERANCES, f"mosi/{files.UTTERANCES}", files.UTTERANCES, "mosi.pkl"):
        if os.path.lexists(folder / name):
            return folder / name
    return None


def read(place: Path, split: str, name: str) -> Corpus:
    try:
        path = found_in(place) if place.is_dir() else place
        if path is None or not path.exists():
            held = "which does not exist"
            if path is None:
                held = f"a folder with {sorted(file.name for file in place.iterdir())[:9]}"
            raise FileNotFoundError(
                f"`{name}` must be {KINDS}. Got {path or place}, {held}. Fetch it: python -m "
                "examples.mosi.download, or take --data simulated."
            )
        kind = kind_of(path)
        if kind == "npz":
            return files.read(path, split)
        if kind in READERS:
            if split != "standard":
                raise ValueError(
                    f'`split` must be "standard" with {path.name}, which has its own. Got {split!r}. Leave it out.'
                )
            return READERS[kind](path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"`{name}` must be readable. Got {error}. Give another place.") from error
    raise ValueError(f"`{name}` must be {KINDS}. Got {path}, {kind}. Convert it, or give another.")


READERS = {"csv": own.read, "pickle": published.read}


def kind_of(path: Path) -> str:
    """npz, csv or pickle, or in words what else a file is."""
    if not path.is_file():
        return "no regular file"
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"PK\x03\x04"):
            try:
                names = zipfile.ZipFile(file).namelist()
            except (ValueError, NotImplementedError, zipfile.BadZipFile):
                return "npz"  # a damaged one, as its reader says
            if any(name.endswith("/data.pkl") for name in names):
                return "a file of PyTorch, as pt are"
            return "npz" if any(name.endswith(".npy") for name in names) else "a zip file"
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            return kind
    if suffix in (".csv", ".npz"):
        return suffix.removeprefix(".")
    if start.startswith(PICKLES) or suffix in (".pkl", ".pickle", ".p"):
        return "pickle"
    return "a file of another kind" if start else "an empty file"
