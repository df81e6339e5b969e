"""The data of the MOSI example: reading, checks, splits, batches, and the fallback."""

import dataclasses
import io
import json
import os
import pickle
import re
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.mosi import door
from examples.mosi.config import Config
from examples.mosi.data import Ragged, atomic, check_present, load, scale_of, standardise
from examples.mosi.files import UTTERANCES, VISUAL, WORDS
from examples.mosi.simulated import simulate
from examples.mosi.text import states, tokenise
from tests.mosi import samples

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=12)


@pytest.fixture
def columns():
    return samples.table()


@pytest.fixture(scope="module")
def simulated():
    return samples.dataset(simulate())


@given(lengths=lengths, data=st.data())
def test_padding_keeps_every_row_and_marks_the_rest(lengths, data):
    parts = [torch.randn(length, 3) for length in lengths]
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1)))
    padded, mask = Ragged.of(parts).pad(index)
    assert padded.shape[1] == max(lengths[i] for i in index)
    for row, exists, i in zip(padded, mask, index, strict=True):
        assert torch.equal(row[exists], parts[i])
        assert exists.sum() == lengths[i]


@given(size=st.integers(1, 300), seed=st.integers(0, 9))
def test_an_epoch_holds_each_utterance_once_in_batches_of_nearly_one_size(simulated, size, seed):
    batches = simulated.batches("train", size, torch.Generator().manual_seed(seed))
    assert torch.equal(torch.cat(batches).sort().values, simulated.corpus.split["train"])
    assert max(map(len, batches)) <= size
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_shuffling_depends_on_the_seed_alone(simulated):
    def epoch(seed):
        return torch.cat(simulated.batches("train", 32, torch.Generator().manual_seed(seed)))

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


@given(size=st.integers(2, 9), world=st.integers(1, 4))
def test_shards_divide_a_batch(simulated, size, world):
    batch = simulated.batch(torch.arange(size), ["audio", "timing"])
    shards = [batch.shard(rank, world) for rank in range(min(size, world))]
    assert sorted(torch.cat([shard.index for shard in shards]).tolist()) == list(range(size))
    for shard in shards:
        rows = shard.index
        assert torch.equal(shard.labels, batch.labels[rows])
        assert torch.equal(shard.text, batch.text[rows])
        assert torch.equal(shard.features["timing"], batch.features["timing"][rows])
        assert shard.size == size


def test_word_features_follow_their_sub_words(columns, tmp_path):
    corpus = load(str(samples.write(tmp_path, columns)))
    words = Ragged.of([torch.zeros(8, 4)] * len(corpus.ids))
    word_of = torch.tensor([-1, 0, 0, 1, 2, 3, 4, -1]).repeat(len(corpus.ids))
    batch = samples.Dataset(corpus, words, word_of).batch(torch.tensor([0, 3]), ["timing", "audio"])
    assert batch.masks["timing"].tolist() == [[False, *[True] * 6, False]] * 2
    assert torch.equal(batch.features["timing"][:, 1], batch.features["timing"][:, 2])
    assert not torch.equal(batch.features["timing"][:, 2], batch.features["timing"][:, 3])
    assert not batch.features["timing"][:, 0].any()
    assert batch.features["audio"].shape == (2, 1, 73)


def test_words_that_the_aligner_missed_have_no_timing(columns, tmp_path):
    said = samples.spoken(columns)
    del said[0]["words"][3]
    timing = load(str(samples.write(tmp_path, columns, said))).features["timing"]
    assert timing.at.rows[:5].tolist() == [0, 1, -1, 2, 3]
    seconds, _, before, after, start, _ = timing.rows[1].tolist()
    assert (seconds, before, after) == pytest.approx((0.25, 0.25, 0.75))
    assert start == pytest.approx(1.0 / 2.75)


def test_an_utterance_without_words_has_no_timing_and_still_counts(columns, tmp_path):
    said = samples.spoken(columns)
    said[0]["words"] = []
    data = samples.dataset(load(str(samples.write(tmp_path, columns, said))))
    batch = data.batch(torch.tensor([0]), ["timing"])
    assert not batch.masks["timing"].any()
    assert torch.isfinite(batch.features["timing"]).all()


def test_statistics_come_from_the_training_rows_alone():
    rows, at = (
        torch.randn(10, 3) * 5 + 2,
        Ragged.of([torch.arange(i, i + 2) for i in range(0, 10, 2)]),
    )
    train = at.pad(torch.tensor([0, 1, 2]))
    scaled = standardise(rows, *scale_of(rows, train))
    torch.testing.assert_close(scaled[:6].mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled[:6].std(0, correction=0), torch.ones(3))
    rows[6:] = 1e9
    assert torch.equal(standardise(rows, *scale_of(rows, train))[:6], scaled[:6])
    assert (standardise(rows, *scale_of(rows, train))[6:] == 10).all()


def test_other_utterances_do_not_change_what_training_sees(columns, tmp_path):
    train = torch.from_numpy(np.flatnonzero(columns["split"] == "train"))
    before = samples.dataset(load(str(samples.write(tmp_path, columns)))).batch(train, ["audio"])
    columns["acoustic73"][columns["split"] != "train"] *= 100
    after = samples.dataset(load(str(samples.write(tmp_path, columns)))).batch(train, ["audio"])
    assert torch.equal(before.features["audio"], after.features["audio"])


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_a_constant_column_becomes_zero(value):
    rows = torch.full((5, 1), value)
    rows[4] = value + 1
    train = Ragged(torch.arange(5), torch.arange(6)).pad(torch.arange(4))
    assert standardise(rows, *scale_of(rows, train)).tolist() == [[0.0]] * 5


def test_the_poria_split_keeps_the_videos_of_its_parts_apart(columns, tmp_path):
    corpus = load(str(samples.write(tmp_path, columns)), "poria")
    videos = [set(columns["video"][index]) for index in corpus.split.values()]
    assert all(videos)
    assert sum(map(len, videos)) == len(set.union(*videos)) == 12
    assert set(columns["poria_split"][corpus.split["test"]]) == {"test"}
    assert "LEAK" in corpus.banner


def test_leaking_features_are_not_in_the_standard_split(columns, tmp_path):
    corpus = load(str(samples.write(tmp_path, columns)))
    assert set(corpus.features) == {"audio", "timing"}
    assert "LEAK" not in corpus.banner


def test_data_may_be_the_file_its_folder_or_the_folder_above(columns, tmp_path):
    folder = tmp_path / "mosi"
    folder.mkdir()
    samples.write(folder, columns)
    digests = {load(str(place)).digest() for place in (tmp_path, folder, folder / UTTERANCES)}
    assert len(digests) == 1


def test_auto_takes_the_folder_of_the_environment_first(columns, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADBALANCE_DATA", str(samples.write(tmp_path, columns)))
    assert load().ids == columns["id"].tolist()
    assert load().source == "real"


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An environment in which no data is found: an empty cache, and no data beside the repository."""
    monkeypatch.delenv("GRADBALANCE_DATA", raising=False)
    monkeypatch.setenv("GRADBALANCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(door, "BESIDE", tmp_path / "beside")
    return tmp_path


def test_the_simulation_says_where_data_was_looked_for(nowhere):
    corpus = load()
    assert corpus.source == "simulated"
    for said in (
        "SIMULATED",
        str(nowhere / "cache"),
        str(nowhere / "beside"),
        "examples.mosi.download",
    ):
        assert said in corpus.banner
    assert "looked" not in load("simulated").banner


@pytest.mark.parametrize("variable", [True, False])
@pytest.mark.parametrize(
    "place",
    [
        "nowhere",
        "nowhere.pkl",
        "nowhere.npz",
        "empty",
        "full",
        "pipe",
        "odd",
        "simulated:0",
        "simulated:x",
    ],
)
def test_data_that_was_asked_for_is_refused_by_name_and_never_replaced(
    nowhere, monkeypatch, variable, place
):
    for folder in ("empty", "full"):
        (nowhere / folder).mkdir()
    (nowhere / "full" / "other.txt").write_text("x")
    (nowhere / "odd").write_text("<html>")
    os.mkfifo(nowhere / "pipe")
    asked = place if ":" in place else str(nowhere / place)
    if variable:
        monkeypatch.setenv("GRADBALANCE_DATA", asked)
    name = "GRADBALANCE_DATA" if variable else "data"
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"`{name}` must be .* Got {re.escape(asked)}"
    ):
        load(*[] if variable else [asked])


@pytest.mark.parametrize("name", ["mosi.pkl", "mosi_utterance.npz", "utterances.csv"])
def test_a_damaged_file_that_was_found_is_never_replaced(nowhere, name):
    (nowhere / "cache").mkdir()
    (nowhere / "cache" / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=rf"{name}` must be a "):
        load()


def test_what_was_downloaded_is_found(nowhere):
    (nowhere / "cache").mkdir()
    rows = {
        "id": ["a", "b", "c"],
        "text": ["x"] * 3,
        "label": [1, 2, 3],
        "split": ["train", "dev", "test"],
    }
    (nowhere / "cache" / "mosi.pkl").write_bytes(pickle.dumps(rows))
    assert load().ids == ["a", "b", "c"]


def test_the_environment_may_name_a_file_or_the_simulation(nowhere, monkeypatch, columns):
    file = samples.write(nowhere, columns) / UTTERANCES
    monkeypatch.setenv("GRADBALANCE_DATA", str(file))
    assert load().ids == columns["id"].tolist()
    monkeypatch.setenv("GRADBALANCE_DATA", "simulated:8")
    assert load().digest() == load("simulated:8").digest()


KINDS = {
    "an HDF5 file": ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)),
    "an HDF5 file, ": ("a.csd", b"\x89HDF\r\n\x1a\n" + bytes(99)),
    "one array, without texts and labels": ("a.npy", b"\x93NUMPY\x01\x00" + bytes(99)),
    "a gzip file": ("mosi.pkl.gz", b"\x1f\x8b" + bytes(99)),
    "an empty file": ("data", b""),
    "a file of another kind": ("a.txt", b"id,text"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named_and_so_are_those_that_can_be_read(tmp_path, kind):
    name, content = KINDS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"`data` must be a folder with utterances.csv, .*{name}, {kind}"
    ):
        load(str(tmp_path / name))


def test_zip_files_are_told_apart(tmp_path, columns):
    torch.save(torch.ones(2), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"Got .*a\.npz, a file of PyTorch"):
        load(str(tmp_path / "a.npz"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("mosi.pkl", b"x")
    with pytest.raises(ValueError, match=r"Got .*b\.zip, a zip file"):
        load(str(tmp_path / "b.zip"))
    samples.write(tmp_path, columns)
    (tmp_path / UTTERANCES).rename(tmp_path / "of no suffix")
    assert load(str(tmp_path / "of no suffix")).ids == columns["id"].tolist()


def test_the_digest_sees_every_part_of_the_corpus(columns, tmp_path):
    corpus = load(str(samples.write(tmp_path, columns)))
    audio = corpus.features["audio"]
    others = [
        dataclasses.replace(corpus, labels=-corpus.labels),
        dataclasses.replace(corpus, words=[["other"], *corpus.words[1:]]),
        dataclasses.replace(corpus, split=corpus.split | {"train": corpus.split["train"][1:]}),
        dataclasses.replace(
            corpus, features=corpus.features | {"audio": audio._replace(rows=audio.rows + 1)}
        ),
    ]
    assert len({corpus.digest(), *(other.digest() for other in others)}) == 5


def spoil(name, row, value):
    def change(columns):
        columns[name][row] = value

    return change


def shorten(columns):
    columns["label"] = columns["label"][:-1]


def resize(name, shape):
    def change(columns):
        columns[name] = np.zeros(shape, np.float32)

    return change


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (
            spoil("label", 5, 3.2),
            "standard",
            r"`label` of .*npz must be within \[-3, 3\].*3.2.* in row 5 \(video01_1\)",
        ),
        (
            spoil("label", 5, np.nan),
            "standard",
            r"`label` of .*npz must be finite. Got nan in row 5 \(video01_1\)",
        ),
        (
            spoil("acoustic73", (7, 2), np.inf),
            "standard",
            r"`acoustic73` .* Got inf in row 7 \(video01_3\), column 2",
        ),
        (
            spoil(VISUAL, (1, 9), np.nan),
            "poria",
            rf"`{VISUAL}` .* Got nan in row 1 \(video00_1\), column 9",
        ),
        (
            spoil("label", 5, 3.0000002),
            "standard",
            r"`label` of .* must be within .* Got 3.00000024 in row 5 \(video01_1\)",
        ),
        (
            spoil("split", 5, "vaild"),
            "standard",
            r"`split` of .*npz must be train, valid .* Got vaild in row 5 \(video01_1\)",
        ),
        (spoil("split", slice(None), "train"), "standard", "`split` .* Got none in valid"),
        (
            resize("acoustic73", (48, 0)),
            "standard",
            r"`acoustic73` of .* must be numbers \[T, D\]. Got float32 of shape \[1, 0\] in row 0",
        ),
        (resize("acoustic73", (48, 2, 2)), "standard", "`acoustic73` of .* must be an array"),
        (resize("label", (48, 2)), "standard", "`label` of .* must be one number"),
        (resize("label", ()), "standard", "`label` of .* must have one row per `id`"),
        (
            resize("text", (48,)),
            "standard",
            r"`text` of .* must be a sentence .* Got .*0.0.* in row 0",
        ),
        (shorten, "standard", r"`label` of .*npz must have one row per `id`. Got 47 rows for 48"),
        (
            lambda columns: columns.pop("acoustic73"),
            "standard",
            r"must hold the fields .*'acoustic73",
        ),
    ],
)
def test_bad_values_are_named_by_file_field_and_row(columns, tmp_path, change, split, message):
    said = samples.spoken(columns)
    change(columns)
    samples.write(tmp_path, columns, said)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path), split)


def test_timing_that_is_not_finite_is_named_by_utterance(columns, tmp_path):
    said = samples.spoken(columns)
    said[2]["words"][1][2] = float("nan")
    with pytest.raises(ValueError, match=rf"`words` of .*{WORDS} must be finite.*\(video00_2\)"):
        load(str(samples.write(tmp_path, columns, said)))


def test_an_utterance_that_the_word_file_lacks_is_named(columns, tmp_path):
    with pytest.raises(ValueError, match=r"must cover every utterance. Got nothing for video00_0"):
        load(str(samples.write(tmp_path, columns, samples.spoken(columns)[1:])))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(columns, tmp_path, keep):
    for name in (UTTERANCES, WORDS):
        path = samples.write(tmp_path, columns) / name
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        with pytest.raises(ValueError, match=rf"{name}` must be a complete"):
            load(str(tmp_path))


@pytest.mark.parametrize("name", [UTTERANCES, WORDS])
def test_a_missing_file_is_named(columns, tmp_path, name):
    (samples.write(tmp_path, columns) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(str(tmp_path))


def test_labels_may_be_a_column_and_texts_bytes(columns, tmp_path):
    said = samples.spoken(columns)
    expected = load(str(samples.write(tmp_path, columns, said))).digest()
    columns["label"] = columns["label"][:, None]
    for name in ("id", "text", "video", "split"):
        columns[name] = columns[name].astype("S")
    assert load(str(samples.write(tmp_path, columns, said))).digest() == expected


def header(shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


@pytest.mark.parametrize(
    "content", [header((10**12,)), header((1 << 62, 1 << 62)), b"\x93NUMPY\x09\x00", b""]
)
def test_a_header_of_more_than_there_is_is_refused(columns, tmp_path, content):
    path = samples.write(tmp_path, columns) / UTTERANCES
    with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings(action="ignore"):
        file.writestr("label.npy", content)
    with pytest.raises(ValueError, match="must be a complete npz file of numbers and strings"):
        load(str(tmp_path))


def test_a_file_that_expands_without_measure_is_refused(columns, tmp_path):
    samples.write(tmp_path, columns)
    np.savez_compressed(tmp_path / UTTERANCES, **columns | {"acoustic73": np.zeros((48, 100_000))})
    with pytest.raises(ValueError, match="arrays of more than 100 times its size"):
        load(str(tmp_path))


def test_a_pipe_beside_the_data_is_refused(columns, tmp_path):
    (samples.write(tmp_path, columns) / WORDS).unlink()
    os.mkfifo(tmp_path / WORDS)
    with pytest.raises(ValueError, match="no regular file"):
        load(str(tmp_path))


def test_a_word_file_without_words_leaves_timing_out_by_name(columns, tmp_path):
    said = [{"id": name, "words": []} for name in columns["id"]]
    data = samples.dataset(load(str(samples.write(tmp_path, columns, said))))
    with pytest.raises(ValueError, match=r"Got 'timing'.*--modalities text audio"):
        check_present(data.corpus, Config().others(data.widths))
    assert Config(modalities=("text", "audio")).others(data.widths) == ["audio"]


def test_a_pickled_column_is_refused(columns, tmp_path):
    columns["text"] = columns["text"].astype(object)
    with pytest.raises(ValueError, match="must be a complete npz file"):
        load(str(samples.write(tmp_path, columns)))


def test_the_simulation_has_the_size_split_and_videos_of_mosi():
    corpus = simulate()
    assert {part: len(index) for part, index in corpus.split.items()} == {
        "train": 1284,
        "valid": 229,
        "test": 686,
    }
    videos = [{corpus.ids[i].split("_")[0] for i in index} for index in corpus.split.values()]
    assert [len(v) for v in videos] == [52, 10, 31]
    assert len(set.union(*videos)) == 93
    assert len(set(corpus.ids)) == 2199
    assert corpus.labels.abs().max() <= 3
    assert (corpus.source, "SIMULATED" in corpus.banner) == ("simulated", True)
    assert corpus.digest() == simulate().digest() != simulate(seed=1).digest()


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8])
def test_a_simulated_modality_tells_as_much_of_the_label_as_asked(strength):
    corpus = simulate(audio=strength)
    x, y = corpus.features["audio"].rows.double(), corpus.labels.double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    fitted = x @ torch.linalg.lstsq(x, y[:, None]).solution
    assert float(torch.corrcoef(torch.stack([fitted[:, 0], y]))[0, 1]) == pytest.approx(
        strength, abs=0.1
    )


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    with atomic(path) as temporary:
        temporary.write_text("new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return samples.encoder(tmp_path_factory.mktemp("encoder"), words=["the"])


def test_states_are_those_of_each_sentence_alone_and_are_computed_once(
    encoder, tmp_path, monkeypatch
):
    from examples.mosi import text

    monkeypatch.setenv("GRADBALANCE_CACHE", str(tmp_path))
    corpus = SimpleNamespace(
        ids=["a", "b", "c"], words=[["the", "cat"], [], ["the", *["dog"] * 20]]
    )
    tokens, made = (
        tokenise(corpus, encoder),
        states(corpus, Config(text="frozen", text_encoder=encoder)),
    )
    assert tokens.word_of.tolist()[:6] == [-1, 0, 1, 1, 1, -1]
    assert len(tokens.rows.rows) == len(made.rows.rows) == len(tokens.word_of)
    model = text.transformer(encoder).eval()
    for i in range(3):
        numbers, _ = tokens.rows.pad(torch.tensor([i]))
        alone = model(input_ids=numbers).last_hidden_state[0]
        torch.testing.assert_close(
            made.rows.pad(torch.tensor([i]))[0][0], alone, atol=1e-5, rtol=1e-5
        )
    monkeypatch.delattr(text, "encode")
    assert torch.equal(
        states(corpus, Config(text="frozen", text_encoder=encoder)).rows.rows, made.rows.rows
    )
    assert len(list(tmp_path.iterdir())) == 1


def test_json_of_another_kind_is_not_read_as_words(columns, tmp_path):
    samples.write(tmp_path, columns)
    (tmp_path / WORDS).write_text(json.dumps({"id": 1}))
    with pytest.raises(ValueError, match=rf"{WORDS}` must be a complete"):
        load(str(tmp_path))
