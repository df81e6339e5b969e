"""``python -m examples.mosi.predict RUN``: what a finished run says of sentences, or of a file of utterances."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.mosi.__main__ import refuse
from examples.mosi.build import build
from examples.mosi.config import Config
from examples.mosi.data import Corpus, Dataset, Feature, Ragged
from examples.mosi.data import load as load_corpus
from examples.mosi.draw import Draw
from examples.mosi.model import Model
from examples.mosi.run import MODEL, read_checked, table_of, write_predictions
from examples.mosi.text import identity, text_of
from examples.mosi.train import device_of, predict


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.mosi.predict", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a finished run")
    add("--text", nargs="+", metavar="SENTENCE", help="one or more sentences")
    add("--data", help="a folder or file, as for python -m examples.mosi; all of its splits")
    add("--split", default="standard", help="as for python -m examples.mosi")
    add(
        "--csv", type=Path, metavar="OUT", help="write the predictions there; else they are printed"
    )
    add("--text-encoder", help="where the run's text encoder lies now")
    add("--device", default="auto", help="cpu, cuda, or auto")
    add("--threads", type=int, default=1, help="of the CPU (default: 1)")
    options = parser.parse_args()
    try:
        if (options.text is None) == (options.data is None):
            raise ValueError(
                "`text` or `data` must be given, and not both. "
                f"Got {'both' if options.text else 'neither'}. Give sentences, or a file."
            )
        torch.set_num_threads(max(1, options.threads))
        trained = load(options.run, text_encoder=options.text_encoder, device=options.device)
        if options.text:
            corpus = sentences(options.text)
        else:
            corpus = load_corpus(options.data, options.split)
            print(corpus.banner, file=sys.stderr)
        absent = sorted(trained.scaling.keys() - corpus.features.keys())
        if absent:
            print(f"Without {' and '.join(absent)}, with which it was trained.", file=sys.stderr)
        predictions = trained.of(corpus)
        if options.csv:
            write_predictions(options.csv, corpus, predictions)
            print(f"{sum(map(len, predictions.values()))} predictions in {options.csv}")
        elif options.text:
            for sentence, value in zip(options.text, predictions["test"].tolist(), strict=True):
                print(f"{value:+.3f}  {sentence}")
        else:
            table_of(corpus, predictions, sys.stdout)
    except (ValueError, OSError) as error:
        return refuse(str(error))
    return 0


class Trained(NamedTuple):
    """The model of a finished run: called with sentences it returns their sentiment, in [-3, 3] as a rule."""

    model: Model
    config: Config
    scaling: dict[str, tuple[Tensor, Tensor]]  # mean and standard deviation of each modality

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[n], from the text alone: the other modalities count as absent."""
        return self.of(sentences(texts))["test"]

    def of(self, corpus: Corpus) -> dict[str, Tensor]:
        """The predictions for each split of a corpus; modalities that it lacks count as absent."""
        dataset = dataset_of(corpus, self.config, self.scaling)
        names = list(self.model.encoders)
        return {
            part: predict(self.model, dataset, part, names)
            for part, index in corpus.split.items()
            if len(index)
        }


def load(run: str | Path, *, text_encoder: str | None = None, device: str = "auto") -> Trained:
    """The model of a finished run.

    Args:
        run: Its folder.
        text_encoder: Where its text encoder lies, if no longer where it was.
        device: cpu, cuda, or auto.

    Raises:
        ValueError: If the file is damaged, or the text encoder is not the one that the run was trained with.
        FileNotFoundError: If the run is not finished.
    """
    path = Path(run) / MODEL
    if not path.is_file():
        raise FileNotFoundError(
            f"`run` must be the folder of a finished run, with a {MODEL}. Got {run}. "
            f"Finish it: python -m examples.mosi --resume {run}"
        )
    stored = read_checked(path)
    encoder = text_encoder or stored["config"].text_encoder
    config = replace(stored["config"], text_encoder=encoder, device=device)
    target = device_of(config)
    if identity(encoder) != stored["run"]["encoder"]:
        raise ValueError(
            f"`text_encoder` must be the one that the run was trained with. Got other files in {encoder}. "
            "Bring them back, or say with --text-encoder where they are."
        )
    scaling = {name: (mean, std) for name, (mean, std) in stored["scaling"].items()}
    dataset = dataset_of(sentences(["a"]), config, scaling)
    names = config.others(scaling)
    model = build(config, dataset, names, Draw(target))
    model.load_state_dict(stored["weights"])
    return Trained(model.to(target).eval(), config, {name: scaling[name] for name in names})


def sentences(texts: Sequence[str]) -> Corpus:
    """A corpus of sentences without labels or any other modality."""
    if isinstance(texts, str):
        raise TypeError(f"`texts` must be a list of strings. Got {texts!r}. Put it into a list.")
    words = [text.lower().split() for text in texts]
    for text, found in zip(texts, words, strict=True):
        if not found:
            raise ValueError(f"`text` must have a word. Got {text!r}. Leave it out.")
    labels = torch.full((len(words),), torch.nan)
    ids = [str(i) for i in range(len(words))]
    return Corpus("real", "sentences", ids, words, labels, {"test": torch.arange(len(words))}, {})


def dataset_of(
    corpus: Corpus, config: Config, scaling: dict[str, tuple[Tensor, Tensor]]
) -> Dataset:
    """The corpus with the modalities that the model knows, on the scale of its training split."""
    features = {}
    for name, (mean, _) in scaling.items():
        found = corpus.features.get(name)
        if found is None:
            found = absent(len(corpus.ids), len(mean))
        elif found.rows.shape[1] != len(mean):
            raise ValueError(
                f"`{name}` must have {len(mean)} features, as in training. Got {found.rows.shape[1]}. "
                "Take data of the same kind."
            )
        features[name] = found
    text = text_of(corpus, config, kept=bool(corpus.features))
    return Dataset(replace(corpus, features=features), *text, scaling=scaling)


def absent(count: int, width: int) -> Feature:
    nowhere = Ragged(torch.full((count,), -1), torch.arange(count + 1))
    return Feature(torch.zeros(1, width), nowhere, "utterance")


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    sys.exit(main())
