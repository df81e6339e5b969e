"""Own data: a folder, one pickle, or columns in Python, with any number of modalities."""

import pickle

import numpy as np
import pytest
import torch

from examples.mosi.config import Config
from examples.mosi.data import load
from examples.mosi.table import corpus
from examples.mosi.train import train
from tests.mosi import samples

SENTENCES = ["The film, honestly, was good", "bad", "so so", "it was fine", "", "no"]


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return {
        "id": [f"u{i}" for i in range(6)],
        "text": SENTENCES,
        "label": [2.5, -3, 0, 1, 0.5, -1],
        "split": ["train", "train", "train", "valid", "test", "test"],
        "audio": rng.normal(size=(6, 4)),
        "face": rng.normal(size=(6, 5, 3)).astype(np.float32),
        "face_lengths": [5, 1, 2, 3, 0, 1],  # those of the words
        "brain": rng.integers(0, 9, (6, 2, 7)),
        "brain_lengths": [2, 1, 0, 2, 1, 2],
    }


def folder(path, table):
    lines = ["id,text,label,split"]
    for name, text, label, split in zip(
        *(table[c] for c in ("id", "text", "label", "split")), strict=True
    ):
        lines.append(f'{name},"{text}",{label},{split}')
    path.mkdir(exist_ok=True)
    (path / "utterances.csv").write_text("\n".join(lines), encoding="utf-8")
    for name in ("audio", "face", "brain"):
        if name in table:
            lengths = {"lengths": table[f"{name}_lengths"]} if f"{name}_lengths" in table else {}
            if lengths:
                np.savez_compressed(path / f"{name}.npz", **lengths, features=table[name])
            else:
                np.save(path / f"{name}.npy", table[name])
    return path


def test_a_folder_a_pickle_and_columns_give_the_same_corpus(table, tmp_path):
    (tmp_path / "own.pickle").write_bytes(pickle.dumps(table))
    made = [
        corpus(dict(sorted(table.items()))),
        load(str(tmp_path / "own.pickle")),
        load(str(folder(tmp_path / "own", table))),
        load(str(tmp_path / "own" / "utterances.csv")),
    ]
    for one in made:
        one = one.__class__(**vars(one) | {"features": dict(sorted(one.features.items()))})
        assert one.digest() == corpus(dict(sorted(table.items()))).digest()
    found = made[0]
    assert found.words[0] == ["the", "film,", "honestly,", "was", "good"]
    assert {part: index.tolist() for part, index in found.split.items()} == {
        "train": [0, 1, 2],
        "valid": [3],
        "test": [4, 5],
    }
    kinds = {name: feature.per for name, feature in found.features.items()}
    assert kinds == {"audio": "utterance", "brain": "utterance", "face": "word"}
    assert found.features["face"].at.lengths.tolist() == [5, 1, 2, 3, 0, 1]
    torch.testing.assert_close(
        found.features["brain"].rows[0], torch.tensor(table["brain"][0]).float().mean(0)
    )
    assert found.features["brain"].at.rows.tolist() == [0, 1, -1, 2, 3, 4]
    assert "the mean of its steps: brain." in found.banner


@pytest.mark.parametrize("names", [[], ["audio"], ["audio", "face", "brain"]])
def test_any_number_of_modalities_can_be_trained_on(table, names):
    kept = ["id", "text", "label", "split", *names, *(f"{name}_lengths" for name in names)]
    data = samples.dataset(corpus({name: table[name] for name in kept if name in table}))
    result = train(Config(epochs=1, text="frozen", hidden=8, fused=8, latent=1), data)
    assert np.isfinite(result["mae"])


def test_a_modality_of_one_feature_can_be_trained_on(table):
    table["audio"] = table["audio"][:, :1]
    result = train(
        Config(epochs=1, text="frozen", hidden=8, fused=8), samples.dataset(corpus(table))
    )
    assert all(np.isfinite(value) for value in result["history"][0]["train"].values())


def replaced(name, value):
    return lambda table: table.update({name: value})


def nan(name, *place):
    def change(table):
        table[name] = table[name].astype(float)
        table[name][place] = np.nan

    return change


REFUSALS = {
    r"must have the columns id, text, label, split. Got \['id', .*without label": lambda t: t.pop(
        "label"
    ),
    "`label` of .* must have one row per `id`. Got 5 rows for 6": replaced("label", [1] * 5),
    "`audio` of .* must have one row per `id`. Got 5 rows for 6": replaced(
        "audio", np.ones((5, 2))
    ),
    r"`label` .* be one number. Got good in row 2 \(u2\)": replaced(
        "label", [1, 1, "good", 1, 1, 1]
    ),
    r"`label` .* be finite. Got nan in row 1 \(u1\)": replaced("label", [1, "nan", 1, 1, 1, 1]),
    r"`label` .* within \[-3, 3\]. Got 3.1 in row 0 \(u0\)": replaced("label", [3.1] * 6),
    r"`text` .* a sentence .* Got None in row 3 \(u3\)": replaced("text", ["a"] * 3 + [None] * 3),
    r"`split` .* be train, .* Got tset in row 3 \(u3\)": replaced(
        "split", ["train", "dev", "test"] + ["tset"] * 3
    ),
    r"`split` .* be train, .* Got 1 in row 0 \(u0\)": replaced("split", [1] * 6),
    "`split` .* utterances in .* Got none in test": replaced("split", ["train"] * 3 + ["val"] * 3),
    r"`audio` .* be finite. Got nan in row 2 \(u2\), column 3": nan("audio", 2, 3),
    r"`face` .* be finite. Got nan in row 0 \(u0\), column 1": nan("face", 0, 4, 1),
    r"`audio` .* Got inf in row 0 \(u0\), column 0": replaced("audio", np.full((6, 1), np.inf)),
    r"`audio` .* Got 1e\+300 in row 0": replaced("audio", np.full((6, 1), 1e300)),
    r"`audio` .* be numbers \[T, 2\]. Got <U1": replaced("audio", np.full((6, 2), "x")),
    r"`audio` .* be numbers \[T, 2\]. Got complex": replaced("audio", np.full((6, 2), 1j)),
    r"`audio` .* Got float64 of shape \[1, 0\] in row 0": replaced("audio", np.ones((6, 0))),
    r"`audio` .* \[n, T, D\] with audio_lengths. Got shape \[6, 2, 2\]": replaced(
        "audio", np.ones((6, 2, 2))
    ),
    r"`audio` .* Got shape \[6\]": replaced("audio", np.ones(6)),
    r"`face_lengths` .* from 0 to 5. Got 6 in row 1 \(u1\)": replaced(
        "face_lengths", [5, 6, 2, 3, 0, 1]
    ),
    r"`face_lengths` .* from 0 to 5. Got -1": replaced("face_lengths", [-1] * 6),
    r"`face_lengths` .* from 0 to 5. Got 1.5": replaced("face_lengths", [1.5] * 6),
    "`face_lengths` .* Got 2 rows for 6": replaced("face_lengths", [1, 2]),
    r"name a modality by .* Got 'my voice'": replaced("my voice", np.ones((6, 2))),
    r"name a modality by .* Got 'a.b'": replaced("a.b", np.ones((6, 2))),
    "name a modality by .* Got 'keys'": replaced("keys", np.ones((6, 2))),
    "name a modality by .* Got 'self'": replaced("self", np.ones((6, 2))),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_is_wrong_is_named_by_column_row_and_value(table, message):
    REFUSALS[message](table)
    with pytest.raises(ValueError, match=message):
        corpus(table)


CSV = {
    r"Got the columns \['id;text;label;split'\], in which 'id' is not once": "id;text;label;split\n",
    "'id' is not once": "",
    "'label' is not once": "id,text,label,label,split\n",
    r"Got 5 cells in line 3, not 4: \['b', 'well'": "id,text,label,split\na,x,1,train\nb,well, no,1,dev\n",
    r"`label` of .*utterances.csv must be one number. Got 1,5 in line 2 \(a\)": 'id,text,label,split\na,x,"1,5",train\n',
    "must be a CSV file in UTF-8": b"id,text,label,split\na,caf\xe9,1,train\n",
    r"`split` of .* Got Tarin in line 4 \(b\)": 'id,text,label,split\n\na,"x\ny",1,train\nb,,1,Tarin\n'.replace(
        "\n\n", "\n"
    ),
    "Got none in train": "id,text,label,split\n",
}


@pytest.mark.parametrize("message", CSV)
def test_a_csv_file_is_refused_with_its_line(tmp_path, message):
    content = CSV[message]
    (tmp_path / "utterances.csv").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


def test_a_csv_file_of_a_spreadsheet_is_read(table, tmp_path):
    path = (
        folder(tmp_path, {name: table[name] for name in ("id", "text", "label", "split")})
        / "utterances.csv"
    )
    expected = load(str(tmp_path))
    text = (
        path.read_text()
        .replace("\n", "\r\n")
        .replace("id,", "note,id,")
        .replace("\r\nu", "\r\n-,u")
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("valid", "Val ").encode() + b"\r\n\r\n")
    assert load(str(tmp_path)).digest() == expected.digest()


def test_videos_in_a_csv_file_warn_of_a_leak(table, tmp_path):
    path = folder(tmp_path, table) / "utterances.csv"
    header, *rows = path.read_text().splitlines()
    rows = [f"{row},v{i % 4}" for i, row in enumerate(rows)]
    path.write_text("\n".join([f"{header},video", *rows]))
    assert (
        "WARNING: training shares 2 of its videos with validation or test, as v0."
        in load(str(tmp_path)).banner
    )


def two_arrays(path):
    np.savez(path / "audio.npz", a=np.ones((6, 2)), b=np.ones((6, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (two_arrays, r"`.*audio.npz` must hold one array, .* Got \['a', 'b'\]"),
        (
            lambda path: np.savez(path / "audio.npz", np.ones((6, 2))),
            "one file a modality. Got two of audio",
        ),
        (
            lambda path: np.save(path / "text.npy", np.ones((6, 2))),
            "name a modality by .* Got 'text'",
        ),
        (
            lambda path: np.save(path / "my-voice.npy", np.ones((6, 2))),
            "name a modality by .* Got 'my-voice'",
        ),
        (
            lambda path: (path / "face.npy").write_bytes(b"x"),
            r"`.*face.npy` must be a complete npy file",
        ),
        (lambda path: np.save(path / "face.npy", np.array([{}] * 6)), "Got an array of objects"),
        (lambda path: (path / "face.npy").mkdir(), "face.npy` .* Got no regular file"),
    ],
)
def test_a_file_of_a_modality_is_refused_by_its_name(table, tmp_path, change, message):
    for name in ("face", "brain"):
        del table[name], table[f"{name}_lengths"]
    folder(tmp_path, table)
    change(tmp_path)
    if message.startswith("`.*audio"):
        (tmp_path / "audio.npy").unlink()
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))
