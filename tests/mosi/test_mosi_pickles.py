"""Pickles of others: files in the two usual formats are read, hostile ones are refused and run nothing."""

import hashlib
import io
import os
import pickle
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.mosi import pickles, published
from examples.mosi.config import Config
from examples.mosi.data import Dataset, Ragged, check_present, load
from examples.mosi.train import train
from tests.mosi.samples import dataset

PLACES = [
    Path(os.environ.get("GRADBALANCE_DATA", ".")),
    Path(__file__).resolve().parents[2] / "../shared/data/mosi",
]
REAL = next(
    (path for place in PLACES if (path := place / "mosi_dev229_wordaligned.npz").is_file()), None
)
TABLE = {
    "id": ["a", "b", "c"],
    "text": ["A b", "c", "d"],
    "label": [1, 0, -1.5],
    "split": ["train", "dev", "test"],
}
SPLIT = {"train": slice(0, 40), "dev": slice(40, 50), "test": slice(50, 60)}


@pytest.fixture(scope="module")
def utterances():
    """60 real utterances; a machine that runs CI must have them."""
    if REAL is None:
        if os.environ.get("CI") == "true":
            pytest.fail(
                "mosi_dev229_wordaligned.npz must be there in CI. Got none. Set $GRADBALANCE_DATA."
            )
        pytest.skip(
            "needs mosi_dev229_wordaligned.npz of CMU-MOSI: set $GRADBALANCE_DATA to its folder"
        )
    file = np.load(REAL)
    ends = file["offset"]
    return [
        (
            (
                file["words"][start:stop].tolist(),
                file["visual47"][start:stop],
                file["acoustic74"][start:stop],
            ),
            label.reshape(1, 1),
            str(segment),
        )
        for start, stop, label, segment in zip(
            ends, ends[1:], file["label"], file["segment"], strict=False
        )
    ][:60]


def mag(utterances):
    return {part: utterances[rows] for part, rows in SPLIT.items()}


def mmsa(utterances, steps=50):
    def table(part):
        def padded(rows, width):
            rows = rows[:steps, :width]
            return np.concatenate([rows, np.zeros((steps - len(rows), width), np.float32)])

        return {
            "raw_text": np.array([" ".join(words) for (words, _, _), _, _ in part]),
            "audio": np.stack([padded(acoustic, 5) for (_, _, acoustic), _, _ in part]).astype(
                np.float64
            ),
            "vision": np.stack([padded(visual, 20) for (_, visual, _), _, _ in part]),
            "text_bert": np.zeros((len(part), 3, steps), np.float32),
            "regression_labels": np.array([label.item() for _, label, _ in part], np.float32),
            "id": [segment for *_, segment in part],
            "audio_lengths": [len(words) for (words, _, _), _, _ in part],
        }

    return {
        "valid" if part == "dev" else part: table(utterances[rows]) for part, rows in SPLIT.items()
    }


def write(folder, content, protocol=4):
    path = folder / "mosi.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_the_file_of_mag_bert_is_read_as_it_was_written(utterances, tmp_path, protocol):
    corpus = load(str(write(tmp_path, mag(utterances), protocol)))
    assert {part: len(index) for part, index in corpus.split.items()} == {
        "train": 40,
        "valid": 10,
        "test": 10,
    }
    for name, column in (("audio", 2), ("visual", 1)):
        expected = np.concatenate([parts[column] for parts, _, _ in utterances])
        assert np.array_equal(corpus.features[name].rows.numpy(), expected)
        assert corpus.features[name].at.lengths.tolist() == [
            len(parts[0]) for parts, _, _ in utterances
        ]
    assert corpus.words == [[word.lower() for word in parts[0]] for parts, _, _ in utterances]
    assert corpus.labels.tolist() == [label.item() for _, label, _ in utterances]


def test_words_are_laid_along_the_tokens(utterances, tmp_path):
    data = dataset(load(str(write(tmp_path, mag(utterances)))))
    batch = data.batch(torch.tensor([3]), ["audio", "visual"])
    words = len(utterances[3][0][0])
    assert batch.masks["audio"][0].tolist() == [False, *[True] * words, False]


@pytest.mark.parametrize("protocol", range(6))
def test_the_file_of_mmsa_gives_the_mean_of_the_steps_that_exist(utterances, tmp_path, protocol):
    corpus = load(str(write(tmp_path, mmsa(utterances), protocol)))
    for name, column, width in (("audio", 2, 5), ("visual", 1, 20)):
        expected = np.stack([parts[column][:50, :width].mean(0) for parts, _, _ in utterances])
        np.testing.assert_allclose(
            corpus.features[name].rows.numpy(), expected, rtol=2e-4, atol=1e-5
        )
    assert corpus.labels.tolist() == [np.float32(label.item()) for _, label, _ in utterances]


def test_a_modality_of_padding_alone_is_absent(utterances, tmp_path):
    content = mmsa(utterances)
    content["train"]["audio"][0] = 0
    corpus = load(str(write(tmp_path, content)))
    assert corpus.features["audio"].at.rows[:2].tolist() == [-1, 0]


def test_the_logarithm_of_silence_becomes_zero(utterances, tmp_path):
    content = mag(utterances)
    content["train"][0][0][2][0, 0] = -np.inf
    assert load(str(write(tmp_path, content))).features["audio"].rows[0, 0] == 0


def test_a_pickle_can_be_trained_on(utterances, tmp_path):
    corpus = load(str(write(tmp_path, mag(utterances))))
    result = train(
        Config(epochs=1, text="frozen", hidden=8, fused=8, balance="paper"), dataset(corpus)
    )
    assert result["banner"].startswith(
        "mosi.pkl, the format of MAG-BERT, real data, the file's own split (40/10/10)"
    )


class Hostile:
    def __init__(self, call, *arguments):
        self.made = call, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("call", "arguments", "name"),
    [
        (os.system, ("touch {}",), f"{os.name}.system"),
        (eval, ("open('{}', 'w')",), r"(builtins|__builtin__)\.eval"),
        (getattr, ("", "join"), r"(builtins|__builtin__)\.getattr"),
        (io.open, ("{}", "w"), r"_?io\.open"),
        (np.load, ("{}",), r"numpy\.load"),
    ],
)
def test_a_foreign_global_is_refused_by_name_and_not_run(tmp_path, protocol, call, arguments, name):
    target = tmp_path / "ran"
    content = {"train": [Hostile(call, *(argument.format(target) for argument in arguments))]}
    with pytest.raises(ValueError, match=rf"`.*mosi\.pkl` must .* Got the global {name}\. Nothing"):
        load(str(write(tmp_path, content, protocol)))
    assert not target.exists()


HOSTILE = {
    "a truncated array": (pickle.dumps(np.arange(100.0))[:-200], "Got "),
    "an empty file": (b"", "Got an empty file"),
    "no pickle": (b"<html>404</html>", "Got "),
    "a deep list": (b"]" * 60_000 + b"a" * 59_999 + b".", "must be a dict"),
    "a hash without end": (
        b"(" + b"(" * 9 + b"t" + b"\x85" * 50_000 + b"K\x01d.",
        "Got a key that is no string",
    ),
    "a huge length": (
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc.",
        "Got expected 1099511627776 bytes",
    ),
    "a huge memo": (b"]r\xff\xff\xff\xff.", "Got place 4294967295 of the memo"),
    "an instance": (b"(S'x'\nios\nsystem\n.", "Got opcode INST"),
    "an extension": (b"\x82\x01.", "Got opcode EXT1"),
    "a persistent id": (b"Px\n.", "Got opcode PERSID"),
    "a buffer from outside": (b"\x80\x05\x97.", "Got opcode NEXT_BUFFER"),
    "a call of a string": (
        b"S'os.system'\n(t" + b"R.",
        "'str' object is not callable",
    ),
    "a call of ndarray": (b"cnumpy\nndarray\n(tR.", "Got a call of something that is no function"),
    "a codec": (b"c_codecs\nencode\n(S'eJw'\nS'zlib'\ntR.", "Got codec other than latin1"),
    "a state of a list": (b"](tb.", "Got state is not a dictionary"),
    "a state of a function": (
        b"c_codecs\nencode\n}b.",
        "Got a state of something that is no array",
    ),
    "attributes of a function": (
        b"c_codecs\nencode\n(N}S'function'\nNstb.",
        "Got a state of something that is no array",
    ),
    "a hash of references": (
        b"}(tq\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"K\x01s.",
        "Got a key that is no string",
    ),
    "keys of one hash": (
        b"}("
        + b"".join(b"\x8a\x09" + (i * (2**61 - 1)).to_bytes(9, "little") + b"N" for i in range(9))
        + b"u.",
        "Got a key that is no string",
    ),
    "a global as a value": (b"]c_codecs\nencode\na.", "must be a dict"),
    "a get of nothing": (b"h\x07.", "Got KeyError"),
    "an empty stack": (b".", "Got an empty stack"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_stream_is_refused(tmp_path, name):
    content, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message):
        load(str(write(tmp_path, content)))


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "message"),
    [
        (b"S'O'\n", b"(K\x01t", b"](K\x01ta", "array of objects that are not strings"),
        (b"S'f8'\n", b"(K\x64K\x64K\x64K\x64t", b"S'x'\n", "whose shape is not that of its bytes"),
        (b"S'V8'\n", b"(K\x01t", b"S'xxxxxxxx'\n", r"an array of \|V8"),
        (b"S'U1'\n", b"(K\x01t", b"U\x04\xff\xff\xff\xff", "a string of letters that do not exist"),
        (b"S'f8'\n", b"(I-1\nt", b"S''\n", "array of a strange shape"),
        (b"S'(2,)f8'\n", b"(K\x01t", b"S''\n", r"an array of .*f8"),
    ],
)
def test_a_hostile_array_is_refused(tmp_path, dtype, shape, data, message):
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tS'b'\ntR"
    state = (
        b"(K\x01" + shape + b"cnumpy\ndtype\n(" + dtype + b"I00\nI01\ntR" + b"I00\n" + data + b"t"
    )
    with pytest.raises(ValueError, match=message):
        load(str(write(tmp_path, made + state + b"b.")))


@pytest.mark.parametrize(("word", "width"), [("a", 74), ("a" * 100_000, 1)])
def test_one_example_under_many_references_is_refused(tmp_path, word, width):
    rows = np.ones((100, width), np.float32)
    example = (([word] * 100, rows, rows), np.ones((1, 1)), "segment")
    content = dict.fromkeys(("train", "dev", "test"), [example] * 1000)
    with pytest.raises(ValueError, match=r"Got more than \d+ bytes in \d+\. Nothing was copied"):
        load(str(write(tmp_path, content)))


def test_an_array_of_objects_may_hold_strings_alone(tmp_path):
    made = pickles.load(write(tmp_path, np.array(["a", "film"], dtype=object)))
    assert made.tolist() == ["a", "film"]
    with pytest.raises(ValueError, match="array of objects that are not strings"):
        pickles.load(write(tmp_path, np.array(["a", 1], dtype=object)))


def test_nested_references_cost_nothing(tmp_path):
    laughs = ["ha"]
    for _ in range(100):
        laughs = [laughs] * 10
    with pytest.raises(ValueError, match="must be a dict"):
        load(str(write(tmp_path, laughs)))
    for column in ("text", "label", "split"):
        with pytest.raises(ValueError, match=f"`{column}` of"):
            load(str(write(tmp_path, TABLE | {column: [laughs] * 3})))
    with pytest.raises(ValueError, match=r"`audio` of .* must be numbers"):
        load(str(write(tmp_path, TABLE | {"audio": [laughs] * 3})))
    assert len(load(str(write(tmp_path, TABLE | {"id": [laughs] * 3}))).ids[0]) < 1_000_000


def test_the_number_of_opcodes_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="Got more than 1000 opcodes"):
        load(str(write(tmp_path, list(range(2000)))))


@given(content=st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(content, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp(), content)
    with suppress(ValueError):
        pickles.load(path)


@given(cut=st.floats(0, 1), protocol=st.integers(0, 5))
def test_a_truncated_file_is_refused(cut, protocol, tmp_path_factory):
    rows = {"train": [((["a", "b"], np.ones((2, 3)), np.ones((2, 4))), np.ones((1, 1)), "s")]}
    content = pickle.dumps(rows, protocol)
    path = write(tmp_path_factory.getbasetemp(), content[: int(cut * (len(content) - 1))])
    with pytest.raises(ValueError, match="must be a whole pickle"):
        pickles.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.pop("dev"),
            r"must have the parts train, valid \(or dev\) and test. Got \['train', 'test'\]",
        ),
        (
            lambda c: c["train"][0][0][0].append("word"),
            r"`train` of .* one vector of `visual` a word. Got shape \[18, 47\] for 19 words in row 0 \(WKA",
        ),
        (
            lambda c: c["train"].__setitem__(
                0, (c["train"][0][0], np.full((1, 1), np.float32(3.0000002)), "s")
            ),
            r"`label` of .* must be within \[-3, 3\]. Got 3.00000024 in row 0 of train \(s\)",
        ),
        (
            lambda c: c["dev"].__setitem__(3, (c["dev"][3][0], "bad", "s")),
            r"`label` of .* must be one number. Got bad in row 3 of valid \(s\)",
        ),
        (lambda c: c["dev"].clear(), "must have utterances in .* Got none in valid"),
        (
            lambda c: c["dev"].append("odd"),
            r"`valid` of .* must hold \(\(words, .* Got odd in row 10",
        ),
        (
            lambda c: c.update(train={}),
            "`train` of .* must have the fields id, raw_text.*without id",
        ),
        (lambda c: c.update(test=3), "`test` of .* must be a list of utterances. Got 3"),
    ],
)
def test_a_file_of_another_structure_is_refused_with_its_row(utterances, tmp_path, change, message):
    content = pickle.loads(pickle.dumps(mag(utterances)))
    change(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(str(write(tmp_path, content)))
    assert "ownload it again" not in str(caught.value)


def test_a_missing_file_says_how_to_fetch_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Fetch it: python -m examples\.mosi\.download"):
        load(str(tmp_path / "mosi.pkl"))


def test_a_pickle_has_no_other_split(utterances, tmp_path):
    with pytest.raises(ValueError, match=r'`split` must be "standard" with mosi\.pkl'):
        load(str(write(tmp_path, mag(utterances))), "poria")


def spoiled(part, field, value):
    def change(content):
        if value is None:
            del content[part][field]
        else:
            content[part][field] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoiled("valid", "vision", None), "`valid` of .* must have the fields .* without vision"),
        (
            spoiled("train", "regression_labels", np.ones(39)),
            "`regression_labels` of train .* Got 39 rows for 40",
        ),
        (
            spoiled("test", "audio", np.ones((10, 5))),
            r"`audio` of .* must be numbers .* in row 0 of test",
        ),
        (
            spoiled("test", "vision", np.ones((10, 3, 6))),
            r"`vision` .* must be numbers \[T, 20\]. Got float32 of shape \[1, 6\]",
        ),
        (
            spoiled("test", "raw_text", [1] * 10),
            r"`text` of .* must be a sentence .* Got 1 in row 0 of test \(",
        ),
        (
            spoiled("train", "audio_lengths", [-1] * 40),
            r"`train` .* whole numbers in `audio_lengths`. Got -1 in row 0 \(",
        ),
    ],
)
def test_a_field_of_mmsa_is_refused_with_its_row(utterances, tmp_path, change, message):
    content = mmsa(utterances)
    change(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(str(write(tmp_path, content)))
    assert "ownload it again" not in str(caught.value)


def test_other_formats_are_refused_by_their_names(utterances, tmp_path):
    sims = mmsa(utterances)
    for part in sims.values():
        part["regression_labels"] /= 3
        part["regression_labels_T"] = part["regression_labels"]
    with pytest.raises(
        ValueError, match=r"Got the format of CH-SIMS, whose labels are in \[-1, 1\]"
    ):
        load(str(write(tmp_path, sims)))
    mult = mmsa(utterances)
    for part in mult.values():
        part["labels"], part["text"] = (
            part.pop("regression_labels")[:, None, None],
            part.pop("text_bert"),
        )
        del part["raw_text"]
    with pytest.raises(ValueError, match="the format of MulT, which has no words"):
        load(str(write(tmp_path, mult)))
    with pytest.raises(ValueError, match="Got a list, as each part of MISA's data"):
        load(str(write(tmp_path, mag(utterances)["train"])))


def test_the_joined_parts_of_misa_are_read_by_their_words(utterances, tmp_path):
    misa = {
        part: [((np.arange(len(w)), v, a, w), label, name) for (w, v, a), label, name in examples]
        for part, examples in mag(utterances).items()
    }
    expected = load(str(write(tmp_path, mag(utterances))))
    assert load(str(write(tmp_path, misa))).digest() == expected.digest()


def test_bytes_are_decoded(utterances, tmp_path):
    expected = load(str(write(tmp_path, mag(utterances)))).digest()
    encoded = {
        part.encode(): [
            (([w.encode() for w in words], *rest), label, name.encode())
            for (words, *rest), label, name in examples
        ]
        for part, examples in mag(utterances).items()
    }
    assert load(str(write(tmp_path, encoded))).digest() == expected
    content = mmsa(utterances)
    expected = load(str(write(tmp_path, content))).digest()
    for part in content.values():
        part["raw_text"] = np.array([text.encode() for text in part["raw_text"]])
        part["id"] = [name.encode() for name in part["id"]]
    assert load(str(write(tmp_path, content))).digest() == expected


def test_utterances_may_be_repeated_and_are_named_where_a_test_has_them_too(utterances, tmp_path):
    content = mag(utterances)
    expected = load(str(write(tmp_path, content)))
    twice = load(str(write(tmp_path, content | {"train": content["train"] * 2})))
    assert twice.ids == expected.ids[:40] * 2 + expected.ids[40:]
    rows = twice.features["audio"].rows
    steps = int(expected.features["audio"].at.offset[40])
    assert torch.equal(rows[:steps], rows[steps : 2 * steps])
    assert "of its ids" not in twice.banner
    both = load(str(write(tmp_path, content | {"test": content["test"] + content["train"][:1]})))
    said = f"WARNING: training shares 1 of its ids with validation or test, as {expected.ids[0]}."
    assert said in both.banner


def test_a_video_on_both_sides_is_named(tmp_path):
    def table(*names):
        rows = np.ones((len(names), 3, 5))
        return {
            "id": names,
            "raw_text": ["a"] * len(names),
            "regression_labels": np.ones(len(names)),
            "audio": rows,
            "vision": rows,
        }

    content = {"train": table("a$_$1", "b$_$1"), "valid": table("c$_$1"), "test": table("a$_$2")}
    said = "training shares 1 of its videos with validation or test, as a."
    assert said in load(str(write(tmp_path, content))).banner
    content["test"] = table("d$_$2")
    assert "WARNING" not in load(str(write(tmp_path, content))).banner


@pytest.mark.parametrize("first", [False, True])
def test_lengths_say_which_steps_are_padding(utterances, tmp_path, first):
    content = mmsa(utterances)
    steps = np.zeros((40, 50, 5))
    real = slice(-4, None) if first else slice(4)
    steps[:, real] = np.array([1.0, 0.0, 0.0, 2.0])[:, None]  # silence in the middle
    content["train"]["audio"], content["train"]["audio_lengths"] = steps, [4] * 40
    rows = load(str(write(tmp_path, content))).features["audio"].rows[:40]
    assert rows.tolist() == [[0.75] * 5] * 40
    del content["train"]["audio_lengths"]
    rows = load(str(write(tmp_path, content))).features["audio"].rows[:40]
    assert rows.tolist() == [[1.5] * 5] * 40


def test_the_file_that_was_read_is_named_by_its_fingerprint(utterances, tmp_path, monkeypatch):
    path = write(tmp_path, mmsa(utterances))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f" SHA-256 {digest[:16]}." in load(str(path)).banner
    monkeypatch.setitem(published.SHA256, digest, "MOSI/aligned_50.pkl")
    said = f" SHA-256 {digest[:16]}, published by MMSA as MOSI/aligned_50.pkl."
    assert said in load(str(path)).banner


@pytest.mark.parametrize("name", ["data", "mosi.PKL", "a.pickle", "a.p", "a.pt", "a.h5", "a.csd"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 5])
def test_a_pickle_is_known_by_its_content(tmp_path, name, protocol):
    write(tmp_path, TABLE, protocol).rename(tmp_path / name)
    assert load(str(tmp_path / name)).words == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("parts", [("train",), ("train", "valid", "test")])
def test_a_modality_that_training_lacks_is_named(utterances, tmp_path, parts):
    content = mmsa(utterances)
    for part in parts:
        content[part]["audio"][:] = 0
    data = dataset(load(str(write(tmp_path, content))))
    message = "`modalities` must be there in .* Got 'audio'.*Leave it out: --modalities text visual"
    with pytest.raises(ValueError, match=message):
        train(Config(epochs=1, text="frozen", hidden=8, fused=8), data)
    assert Config(modalities=("text", "visual")).others(data.widths) == ["visual"]


def test_a_file_without_any_word_can_be_read(tmp_path):
    rows = np.ones((0, 5), np.float32)
    example = (([], rows, rows), np.ones((1, 1)), "s")
    corpus = load(str(write(tmp_path, {part: [example] for part in SPLIT})))
    data = Dataset(corpus, Ragged.of([torch.zeros(2, 8)] * 3), torch.full((6,), -1))
    with pytest.raises(ValueError, match=r"Got 'audio'.*Leave it out: --modalities text"):
        check_present(data.corpus, Config().others(data.widths))
