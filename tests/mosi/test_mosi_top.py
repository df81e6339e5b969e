"""The top layers of a text encoder, trained on the cached states below them: the same as the whole encoder."""

import os
import shutil
from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from examples.mosi import text, train
from examples.mosi.build import build, optimizer_of
from examples.mosi.config import Config
from examples.mosi.data import Ragged
from examples.mosi.draw import Draw
from examples.mosi.model import Transformer
from examples.mosi.predict import load
from examples.mosi.simulated import simulate
from examples.mosi.top import check_split, top
from tests.mosi import samples

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 50,
}
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
}
ENCODERS = {
    "bert": {},
    "roberta": {},
    "mpnet": {},
    "electra": {"embedding_size": 32},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": RELATIVE | {"position_buckets": 8, "share_att_key": True},
}
NUMBERS = torch.arange(2, 26).view(3, 8)
MASK = torch.arange(8) < torch.tensor([[8], [5], [1]])


def encoder(kind, **more):
    torch.manual_seed(0)
    own = AutoConfig.for_model(kind, **SIZE, **ENCODERS.get(kind, {}), **more)
    model = AutoModel.from_config(own).eval()
    if hasattr(model, "pooler"):
        model.pooler = None
    for parameter in model.parameters():  # of random layers the first hardly matters
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def whole(model):
    return model(input_ids=NUMBERS, attention_mask=MASK.long(), output_hidden_states=True)


@pytest.mark.parametrize(("count", "below"), [(1, 2), (2, 1), (3, 0), (0, 0)])
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_top_layers_return_what_the_whole_encoder_does(kind, count, below):
    model = encoder(kind)
    full = whole(model)
    upper = Transformer(top(deepcopy(model), count), Draw(torch.device("cpu")), "float32").eval()
    again = upper(full.hidden_states[below].detach(), MASK)
    assert_close(again[MASK], full.last_hidden_state[MASK], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_their_gradients_are_those_of_the_whole_encoder_with_the_rest_frozen(kind):
    model = encoder(kind)
    upper = top(deepcopy(model), 2)
    full = whole(model)
    weight = torch.randn(full.last_hidden_state[MASK].shape)
    (full.last_hidden_state[MASK] * weight).sum().backward()
    states = full.hidden_states[1].detach()
    (
        upper(inputs_embeds=states, attention_mask=MASK.long()).last_hidden_state[MASK] * weight
    ).sum().backward()
    trained = {name: p for name, p in upper.named_parameters() if p.requires_grad}
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert trained
    for name, p in trained.items():
        prefix, number, rest = (
            name.split(".", 3)[:2],
            int(name.split(".")[2]),
            name.split(".", 3)[3],
        )
        assert_close(
            p.grad, grads[".".join([*prefix, str(number + 1), rest])], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("kind", "more", "found"),
    [
        ("albert", {"embedding_size": 32}, "no single list of its layers"),
        ("t5", {"num_layers": 3, "d_model": 32}, "no single list of its layers"),
        (
            "deberta-v2",
            {"conv_kernel_size": 3},
            "other states from its top layers than from the whole",
        ),
    ],
)
def test_an_encoder_that_cannot_be_cut_is_refused(kind, more, found):
    model = encoder(kind, **more)
    with pytest.raises(
        ValueError, match=rf"`text_encoder` must have layers .*{found}.*\. Use --text finetune"
    ):
        check_split(model, 2, NUMBERS, MASK)


@pytest.mark.parametrize("count", [-1, 4])
def test_there_are_not_more_layers_than_the_encoder_has(count):
    with pytest.raises(
        ValueError, match=rf"`text_layers` must be from 0 \(all\) to the 3 layers .* Got {count}"
    ):
        top(encoder("bert"), count)


@pytest.fixture(scope="module")
def corpus():
    return simulate(share=40)


@pytest.fixture
def small(corpus, tmp_path, monkeypatch):
    """Settings of a run over the top layer of a small encoder, with a cache of its own."""
    monkeypatch.setenv("GRADBALANCE_CACHE", str(tmp_path / "cache"))
    folder = samples.encoder(
        tmp_path / "encoder", sorted({word for words in corpus.words for word in words})
    )
    return {
        "data": "simulated:40",
        "text": "top",
        "text_layers": 1,
        "text_encoder": folder,
        "batch_size": 8,
        "epochs": 1,
        "hidden": 8,
        "fused": 8,
        "draws": 2,
    }


def test_the_cache_holds_what_enters_the_top_layers(corpus, small):
    config = Config(**small)
    numbers = text.tokenise(corpus, small["text_encoder"]).rows
    below = text.states(corpus, config).rows
    model = text.transformer(small["text_encoder"]).eval()
    index = torch.tensor([0, 5])
    tokens, mask = numbers.pad(index)
    with torch.inference_mode():
        every = model(
            input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True
        ).hidden_states
    assert_close(below.pad(index)[0][mask], every[1][mask], atol=1e-5, rtol=0)
    embedded = text.states(corpus, Config(**small | {"text_layers": 0})).rows
    assert_close(embedded.pad(index)[0][mask], every[0][mask], atol=1e-5, rtol=0)
    frozen = text.states(corpus, Config(**small | {"text": "frozen", "text_pool": 2})).rows
    assert_close(frozen.pad(index)[0][mask], (every[1] + every[2])[mask] / 2, atol=1e-5, rtol=0)


def test_a_damaged_cache_is_computed_anew(corpus, small, tmp_path):
    config = Config(**small)
    first = text.states(corpus, config)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-1000])
    again = text.states(corpus, config)
    assert torch.equal(first.rows.rows, again.rows.rows)
    assert torch.load(path, weights_only=True)["offset"].equal(first.rows.offset)


def test_a_cache_that_was_being_written_leaves_nothing(corpus, small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda saved, path: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        text.states(corpus, Config(**small))
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_a_warning(corpus, small, tmp_path, monkeypatch):
    first = text.states(corpus, Config(**small))
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRADBALANCE_CACHE", str(tmp_path / "file/cache"))
    with pytest.warns(UserWarning, match=r"could not be kept in .*file/cache.* Not a directory"):
        again = text.states(corpus, Config(**small))
    assert torch.equal(first.rows.rows, again.rows.rows)


@pytest.mark.parametrize("kind", ["frozen", "top", "finetune"])
def test_a_run_goes_on_and_predicts_with_its_own_encoder_alone(small, tmp_path, kind):
    config = Config(**small | {"text": kind})
    out, weights = tmp_path / "run", tmp_path / "encoder/model.safetensors"
    train.train(config, out=out, keep_checkpoint=True)
    os.utime(weights)  # copied, but the same
    train.train(config, out=out, resume=True, keep_checkpoint=True)
    expected = load(out)(["good"])
    moved = shutil.copytree(tmp_path / "encoder", tmp_path / "moved")
    assert torch.equal(load(out, text_encoder=str(moved))(["good"]), expected)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"must be of the same text encoder. Got other files"):
        train.train(config, out=out, resume=True)
    with pytest.raises(ValueError, match=r"must be the one that the run was trained with"):
        load(out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_layers": 3}, r"`text_layers` must be from 0 \(all\) to the 2 layers"),
        ({"text": "frozen", "text_pool": 3}, r"`text_pool` must be at most the 2 layers .* Got 3"),
        ({"text_encoder": "/nowhere/at/all"}, r"`text_encoder` must be minilm, a folder"),
    ],
)
def test_settings_that_the_encoder_does_not_have_are_refused(small, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train.train(Config(**small | settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("left", [None, 100])
def test_an_encoder_without_whole_weights_is_refused(small, tmp_path, left):
    weights = tmp_path / "encoder/model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if left:
        weights.write_bytes(content[:left])
    with pytest.raises(
        ValueError, match=r"`text_encoder` must be minilm, a folder with config.json and weights"
    ):
        train.train(Config(**small), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_states_of_another_width_are_refused(small, corpus):
    with pytest.raises(
        ValueError,
        match=r"`dataset` must hold states of the 32 features of .* Got a shape of \(8,\)",
    ):
        train.train(Config(**small), samples.dataset(corpus))


def test_only_the_top_layers_are_trained(small):
    config = Config(**small)
    data = train.prepare(config)
    before = build(config, data, [], Draw(torch.device("cpu"))).text
    numbers = [int(name.split(".")[3]) for name, p in before.named_parameters() if p.requires_grad]
    assert set(numbers) == {0}
    assert not any(
        p.requires_grad for name, p in before.named_parameters() if ".layer." not in name
    )


def test_bf16_keeps_weights_losses_and_statistics_in_float32(small, monkeypatch):
    seen = []

    def losses(output, batch, config, inner=train.losses):
        terms, errors = inner(output, batch, config)
        seen.extend([output.prediction, *output.pooled.values(), *terms.values(), *errors.values()])
        return terms, errors

    monkeypatch.setattr(train, "losses", losses)
    results = {}
    for precision in ("float32", "bf16"):
        config = Config(**small, precision=precision)
        results[precision] = train.train(
            config, also=lambda model, *_: {"state": model.state_dict()}
        )
    assert {x.dtype for x in seen} == {torch.float32}
    assert {x.dtype for x in results["bf16"]["state"].values()} == {torch.float32}
    first, last = (results[p]["history"][0]["train"]["task"] for p in ("float32", "bf16"))
    assert first != last
    assert first == pytest.approx(last, rel=0.02)


def test_bf16_is_refused_where_the_gpu_lacks_it(monkeypatch):
    with pytest.raises(ValueError, match=r'`device` must be "cpu" or "auto" where there is no GPU'):
        train.device_of(Config(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert train.device_of(Config(device="auto")).type == "cuda"
    with pytest.raises(ValueError, match=r'`precision` must be "float32" on this GPU'):
        train.device_of(Config(precision="bf16", device="cuda"))


def test_dropout_draws_for_the_whole_batch_on_every_process(small):
    config = Config(**small)
    data = train.prepare(config)
    draw = Draw(torch.device("cpu"))
    model = build(config, data, ["audio", "timing"], draw).train()
    batch = data.batch(torch.arange(5), ["audio", "timing"])
    outputs = []
    for part in (batch, batch.shard(0, 2), batch.shard(1, 2)):
        draw.generator.manual_seed(3)
        outputs.append(model(part).prediction)
    assert_close(outputs[0][0::2], outputs[1])
    assert_close(outputs[0][1::2], outputs[2])


def test_ragged_states_keep_their_utterances(corpus, small):
    rows = text.states(corpus, Config(**small)).rows
    assert isinstance(rows, Ragged)
    assert len(rows.offset) == len(corpus.ids) + 1


@pytest.mark.parametrize(("given", "expected"), [(0.0, 1e-4 * 384 / 32), (3e-5, 3e-5)])
def test_the_layers_of_the_encoder_have_a_learning_rate_of_their_own(small, given, expected):
    config = Config(**small, text_lr=given, modalities=("text",))
    model = build(config, train.prepare(config), [], Draw(torch.device("cpu")))
    others, encoder = optimizer_of(model, config, 10, torch.Generator()).param_groups
    assert {id(p) for p in encoder["params"]} == {
        id(p) for p in model.text.parameters() if p.requires_grad
    }
    assert (others["lr"], encoder["lr"]) == (config.lr, pytest.approx(expected))
