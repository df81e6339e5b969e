"""A simulated MOSI for machines without the data: its size, split, videos and labels; sentences with a meaning."""

import numpy as np
import torch

from examples.mosi.data import Corpus, Feature, Ragged

VIDEOS = {"train": 52, "valid": 10, "test": 31}
SIZES = {"train": 1284, "valid": 229, "test": 686}
# Share of the real labels nearest to each half point from -3 to 3.
LEVELS = np.array([44, 78, 238, 186, 257, 155, 222, 157, 211, 196, 312, 102, 41]) / 2199
PHRASES = """\
awful|horrible|the worst thing ever|a complete disaster|unwatchable|total garbage
bad|boring|stupid|disappointing|a waste of time|annoying
a bit weak|slow|not great|forgettable|rather dull|predictable
okay|average|about two hours long|what you would expect|a sequel|based on a book
decent|kind of fun|not bad|pretty nice|worth a look|fairly solid
good|really funny|enjoyable|very well made|exciting|touching
amazing|brilliant|the best film of the year|a masterpiece|absolutely perfect|incredible
the movie|the story|the acting|the ending|the script|the music|this film|it|the cast
|i think|honestly|you know|i mean|well|for me|so um|in the end|to be honest
|and that is it|i saw it last night|if you ask me|you know what i mean|so there you go
"""
*OPINIONS, SUBJECTS, OPENINGS, CLOSINGS = [line.split("|") for line in PHRASES.splitlines()]


def simulate(
    *,
    audio: float = 0.35,
    timing: float = 0.2,
    seed: int = 0,
    share: int = 1,
    why: str = "it was asked for",
) -> Corpus:
    """2,199 utterances of 93 videos; sentences carry most of the label, the other modalities as much as asked.

    Args:
        audio: Correlation of the label with the best direction of the audio vector (one an utterance), in [0, 1).
        timing: The same for word timing (one vector a word).
        seed: Of the generator; the same seed gives the same corpus.
        share: One utterance of so many, for a quick look.
        why: Why it is simulated, for the banner.
    """
    rng = np.random.default_rng(seed)
    split, ids = [], []
    for part, videos in VIDEOS.items():
        for video, members in enumerate(np.array_split(np.arange(SIZES[part] // share), videos)):
            ids += [f"{part}{video:02d}_{i}" for i in range(len(members))]
            split += [part] * len(members)
    split = np.array(split)
    video = np.unique([name.split("_")[0] for name in ids], return_inverse=True)[1]
    levels = rng.choice(np.arange(-3, 3.1, 0.5), size=len(ids), p=LEVELS)
    labels = np.clip(np.round(levels + rng.uniform(-0.25, 0.25, len(ids)), 1), -3, 3)
    words = [sentence(label, rng) for label in labels]
    owner = np.repeat(np.arange(len(ids)), [len(w) for w in words])

    def channel(strength: float, width: int, owners: np.ndarray) -> torch.Tensor:
        """A label direction of the given correlation, an offset for each video, and noise of unit variance."""
        signal = strength / np.sqrt(1 - strength**2) * labels / labels.std()
        vectors = (
            rng.normal(size=(len(owners), width))
            + 0.5 * rng.normal(size=(video.max() + 1, width))[video[owners]]
        )
        vectors[:, 0] = signal[owners] + rng.normal(size=len(owners))
        return torch.from_numpy(vectors @ np.linalg.qr(rng.normal(size=(width, width)))[0]).float()

    every, counts = torch.arange(len(ids)), torch.tensor([len(w) for w in words])
    features = {
        "audio": Feature(
            channel(audio, 20, every.numpy()),
            Ragged(every, torch.arange(len(ids) + 1)),
            "utterance",
        ),
        "timing": Feature(
            channel(timing, 6, owner),
            Ragged(
                torch.arange(len(owner)),
                torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
            ),
            "word",
        ),
    }
    index = {part: torch.from_numpy(np.flatnonzero(split == part)) for part in VIDEOS}
    banner = f"SIMULATED MOSI ({why}): no number below says anything about CMU-MOSI."
    return Corpus(
        "simulated", banner, ids, words, torch.from_numpy(labels).float(), index, features
    )


def sentence(label: float, rng: np.random.Generator) -> list[str]:
    """Speakers do not say exactly what their label is: an opinion up to about a point away from it."""
    level = int(np.clip(np.round(label + rng.normal(scale=0.9)), -3, 3)) + 3
    parts = (
        rng.choice(OPENINGS),
        rng.choice(SUBJECTS),
        "was",
        rng.choice(OPINIONS[level]),
        rng.choice(CLOSINGS),
    )
    return " ".join(parts).split()
