"""``python -m examples.mosi.download``: the pickle of CMU-MOSI or CMU-MOSEI, resumed where it stopped and checked."""

import argparse
import sys
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

from examples.mosi.data import cache_folder, fingerprint
from examples.mosi.published import read

# From the download scripts of WasifurRahman/BERT_multimodal_transformer and joshuaxiao98/ITHP.
LINKS = {
    "mosi.pkl": (
        "https://www.dropbox.com/s/sv94igp7zi3rsj1/mosi.pkl?dl=1",
        "https://drive.usercontent.google.com/download?id=12HbavGOtoVCqicvSYWl3zImli5Jz0Nou&export=download&confirm=t",
    ),
    "mosei.pkl": ("https://www.dropbox.com/s/995dvj3506gvk5a/mosei.pkl?dl=1",),
}
LARGEST = 8 << 30  # bytes; both files are far below
CHUNK = 1 << 16


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.mosi.download", description=__doc__)
    parser.add_argument("name", nargs="?", default="mosi.pkl", choices=tuple(LINKS))
    parser.add_argument(
        "--folder", type=Path, default=cache_folder(), help="where it goes (default: %(default)s)"
    )
    parser.add_argument("--url", help="another link to the same file")
    parser.add_argument(
        "--timeout", type=float, default=30, help="seconds without a byte before giving up"
    )
    options = parser.parse_args()
    path = options.folder / options.name
    if path.exists():
        print(f"{path} is there already: {read(path).banner}")
        return 0
    failures = []
    for url in (options.url,) if options.url else LINKS[options.name]:
        try:
            fetch(url, path, timeout=options.timeout)
        except (ValueError, OSError, HTTPException) as error:
            failures.append(f"  {url}\n    {error}")
        else:
            print(
                f"{path}: {read(path).banner}\nTrain on it: python -m examples.mosi --data {path}"
            )
            return 0
    print(
        f"`{options.name}` came from no link:",
        *failures,
        "What arrived is kept where the link can go on: run this again. If a link is dead, look for a new one in the",
        "README of WasifurRahman/BERT_multimodal_transformer or joshuaxiao98/ITHP and give it with --url, or copy the",
        f"file from elsewhere to {path}. aligned_50.pkl of MMSA (thuiar/MMSA) can be read too: --data aligned_50.pkl.",
        "Without any file: python -m examples.mosi --data simulated",
        sep="\n",
        file=sys.stderr,
    )
    return 1


def fetch(url: str, path: Path, *, timeout: float) -> None:
    """Downloads to a file beside `path` that survives an interrupt, checks it, and only then gives it its name.

    Raises:
        ValueError: If less arrives than announced (kept, to go on from), or what arrives is not the data (deleted).
        OSError: If the server is not there, refuses, or stalls for `timeout` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{fingerprint(url.encode())}.part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            expected = receive(response, part, have)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is whole already: nothing follows it
            raise
        expected = None
    except TimeoutError:
        raise TimeoutError(f"no byte for {timeout:g} seconds") from None
    size = part.stat().st_size
    if expected is not None and size < expected:
        raise ValueError(f"the connection ended after {size} of {expected} bytes")
    try:
        read(part)
    except ValueError as error:
        part.unlink()  # nothing to go on from
        raise ValueError(f"not the data: {error}") from error
    part.replace(path)


def receive(response: HTTPResponse, part: Path, have: int) -> int | None:
    """Appends the answer to `part`, or starts it anew where the server cannot go on; returns the announced size."""
    if response.headers.get_content_type() == "text/html":
        raise ValueError("a web page in place of a file: the link is dead, or asks for a click")
    begin, _, _ = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")
    start = have if response.status == 206 and begin == str(have) else 0
    if response.status == 206 and not start:
        raise ValueError("bytes from another place than asked for")
    announced = response.headers.get("Content-Length", "")
    expected = start + int(announced) if announced.isdigit() else None
    if (expected or 0) > LARGEST:
        raise ValueError(f"{expected} bytes announced, more than any of these files has")
    with (
        part.open("ab" if start else "wb") as file,
        tqdm(
            total=expected, initial=start, unit="B", unit_scale=True, desc=part.name.split(".")[1]
        ) as bar,
    ):
        while chunk := response.read1(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > LARGEST:
                raise ValueError(f"more than {LARGEST} bytes, and no end")
    return expected


if __name__ == "__main__":
    sys.exit(main())
