"""Gradients of every kind: absent, frozen, sparse, complex, of low precision, on the meta device, with a graph."""

import numpy as np
import pytest
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty, rules
from tests.contract.optimizers import REPRESENTATIVES, cancels
from tests.contract.oracle import (
    NAMES,
    TOLERANCE,
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    batch,
    loss_of,
    put_on,
    refused,
    train,
)
from tests.contract.own_rules import conflicts

pytestmark = cancels

# One optimizer in the three ways in which a coefficient acts, and the two ways in which gradients are read.
each_mode = pytest.mark.parametrize("mode", ["update", "displacement", "gradient"])
each_rule = pytest.mark.parametrize("rule", ["conflicts", "coherence"])


class Leaves(nn.Module):
    """One parameter per group and one in no group, whose gradients the test sets itself."""

    def __init__(self, dtype=torch.float32, device="cpu", shape=(5, 2)):
        super().__init__()
        for name in NAMES:
            leaf = torch.ones(shape, dtype=dtype, device=device)
            self.register_module(name, nn.ParameterList([nn.Parameter(leaf)]))
        self.rest = nn.Parameter(torch.ones(shape, dtype=dtype, device=device))

    def set_gradients(self, step, kind=lambda g: g, write=None):
        generator = torch.Generator().manual_seed(step)
        for p, scale in zip(
            (*(getattr(self, name)[0] for name in NAMES), self.rest), (1, 10, 1, 2), strict=True
        ):
            g = torch.randn(
                p.shape, generator=generator, dtype=torch.promote_types(p.dtype, torch.float32)
            )
            if write is None or p.grad is None:
                p.grad = kind((scale * g).to(p))
            else:
                write(p.grad, (scale * g).to(p))


def compare(
    mode,
    kind=lambda g: g,
    *,
    dtype=torch.float32,
    base=torch.optim.SGD,
    tolerance=TOLERANCE,
    write=None,
    **options,
):
    """Trains on set gradients, wrapped and by hand."""
    model, twin = Leaves(dtype), Leaves(dtype)
    optimizer = put_on(base(model.parameters(), lr=0.1), model, mode, **options)
    hand = ByHand(lambda groups: base(groups, lr=0.1), twin, mode, **options)
    seen, expected = [], []
    for step in range(5):
        model.set_gradients(step, kind, write)
        twin.set_gradients(step, kind)
        optimizer.step()
        hand.step()
        seen.append(optimizer.coefficients())
        expected.append(hand.coefficients)
    assert_same_coefficients(seen, expected)
    assert_same_parameters(model, twin, tolerance)


@each_mode
@each_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_gradients_of_any_dtype_equal_the_oracle_by_hand(mode, dtype, rule):
    compare(mode, dtype=dtype, rule=rule)


@each_mode
@each_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_low_precision_equal_the_oracle_by_hand(mode, dtype, rule):
    # A rescaled update is rounded twice at each step, at values up to 5.
    roundings = 20 if mode == "displacement" else 4
    compare(mode, dtype=dtype, rule=rule, tolerance=torch.finfo(dtype).eps * roundings)


@each_mode
def test_a_norm_above_the_largest_half_does_not_overflow(mode):
    model = Leaves(torch.float16, shape=(64, 64))
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.0), model, mode)
    for p in model.parameters():
        p.grad = torch.full_like(p, 4e4 if p is model.audio[0] else 1.0)
    optimizer.step()
    assert optimizer.balance.norms.tolist() == pytest.approx([64, 64 * 4e4, 64], rel=1e-3)
    assert optimizer.coefficients()["audio"] == pytest.approx(0.1)


def coalesced(g):
    return g.to_sparse(1)


def sparse_in_rows_and_columns(g):
    return g.to_sparse(2)


def uncoalesced(g):
    """Every row three times, at a third each and of changing sign: as they lie, the entries have another norm."""
    rows = torch.arange(len(g)).repeat(3)[None]
    return torch.sparse_coo_tensor(
        rows, torch.cat([2 * g, -2 * g, g]), g.shape, check_invariants=True
    )


@each_mode
@each_rule
@pytest.mark.parametrize("kind", [coalesced, sparse_in_rows_and_columns, uncoalesced])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
@pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
)  # Adagrad's own
def test_sparse_gradients_equal_the_oracle_by_hand(mode, kind, base, rule):
    compare(mode, kind, base=base, rule=rule)


@each_mode
def test_an_accumulated_sparse_gradient_equals_the_oracle_by_hand(mode):
    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            modules = {name: nn.Embedding(6, 2, sparse=name != "visual") for name in NAMES}
            return nn.ModuleDict(modules)

    def backward(model, step):
        rows = torch.randint(6, (3, 8), generator=torch.Generator().manual_seed(step))
        for row, (name, module) in zip(rows, model.items(), strict=True):
            (module(row).square().sum() * (5.0 if name == "audio" else 1.0)).backward()

    class Views(nn.Module):
        def __init__(self, model):
            super().__init__()
            for name, module in model.items():
                self.register_module(name, module)

    model, twin = Views(build()), Views(build())
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.01), model, mode)
    hand = ByHand(lambda groups: torch.optim.SGD(groups, lr=0.01), twin, mode)
    seen, expected = [], []
    for step in range(0, 6, 2):
        for module in (model, twin):
            backward(dict(module.named_children()), step)
            backward(dict(module.named_children()), step + 1)
        optimizer.step()
        hand.step()
        optimizer.zero_grad()
        hand.optimizer.zero_grad()
        seen.append(optimizer.coefficients())
        expected.append(hand.coefficients)
    assert_same_coefficients(seen, expected)
    assert_same_parameters(model, twin)


@each_mode
@each_rule
@pytest.mark.parametrize("absent", [("text",), ("text", "visual"), NAMES])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_absent_gradients_take_their_group_out_of_the_step(mode, rule, absent, set_to_none):
    model, twin = Toy(), Toy()
    optimizer = put_on(torch.optim.AdamW(model.parameters(), lr=0.1), model, mode, rule)
    hand = ByHand(lambda groups: torch.optim.AdamW(groups, lr=0.1), twin, mode, rule)
    for step in range(5):
        for module in (model, twin):
            loss_of(module, step).backward()
            for name in absent if step % 2 else ():
                getattr(module, name).zero_grad(set_to_none)
        optimizer.step()
        hand.step()
        optimizer.zero_grad()
        hand.optimizer.zero_grad()
        assert optimizer.coefficients() == pytest.approx(hand.coefficients)
    assert_same_parameters(model, twin)


@each_mode
def test_a_frozen_group_is_warned_of_and_takes_no_part(mode):
    model, twin = Toy(), Toy()
    model.text.requires_grad_(False)
    twin.text.requires_grad_(False)
    with pytest.warns(UserWarning, match="`text` requires a gradient: the group is frozen"):
        optimizer = put_on(torch.optim.AdamW(model.parameters(), lr=0.1), model, mode)
    hand = ByHand(lambda groups: torch.optim.AdamW(groups, lr=0.1), twin, mode)
    assert_same_coefficients(
        train(model, optimizer, range(4), observe=False), hand.train(range(4), observe=False)
    )
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("kind", [coalesced, sparse_in_rows_and_columns, uncoalesced])
def test_a_sparse_gradient_that_is_too_large_to_be_read_whole_has_the_coherence_of_the_dense_one(
    kind,
):
    def coherences(kind):
        model = Leaves(shape=(6000, 3))
        optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.1), model, rule="coherence")
        for step in (0, 0, 1):
            model.set_gradients(step, kind)
            optimizer.step()
        return optimizer.balance.coherences.tolist()

    dense = coherences(lambda g: g)
    assert coherences(kind) == pytest.approx(dense, abs=1e-6)
    assert dense == pytest.approx([0.5] * 3, abs=0.1)


@each_mode
@each_rule
@pytest.mark.parametrize("meta", [("text",), NAMES])
def test_parameters_on_the_meta_device_are_skipped(mode, meta, rule):
    model = Leaves()
    for name in meta:
        getattr(model, name)[0] = nn.Parameter(torch.ones(5, 2, device="meta"))
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.1), model, mode, rule)
    for step in range(4):
        model.set_gradients(step)
        optimizer.step()
    acting = {name for name, c in optimizer.coefficients().items() if c != 1}
    assert acting == (
        set() if meta == NAMES else {"audio"} if rule == "conflicts" else {"audio", "visual"}
    )
    assert optimizer.balance.step == 4 * (meta != NAMES)


@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_the_derivative_of_a_differentiable_step_holds_the_coefficient(mode):
    def stepped(scale, wrap):
        """The audio parameter after a step on the gradient of ``scale * p.square()``."""
        leaves = {name: torch.ones(2, requires_grad=True, dtype=torch.float64) for name in NAMES}
        params = [p.clone() for p in leaves.values()]
        inner = torch.optim.SGD(params, lr=0.1, differentiable=True)
        loss = sum(p.square().sum() * (scale if i == 1 else 1.0) for i, p in enumerate(params))
        for p, gradient in zip(
            params, torch.autograd.grad(loss, params, create_graph=True), strict=True
        ):
            p.grad = gradient
        c = 1.0
        if wrap:
            groups = {n: [p] for n, p in zip(NAMES, params, strict=True)}
            optimizer = ConflictAwarePenalty(inner, groups, conflicts(), apply_to=mode)
            optimizer.step()
            c = optimizer.coefficients()["audio"]
        else:
            inner.step()
        (derivative,) = torch.autograd.grad(params[1].sum(), scale)
        return derivative.item(), c

    scale = torch.tensor(10.0, requires_grad=True, dtype=torch.float64)
    plain, _ = stepped(scale, wrap=False)
    ours, c = stepped(scale, wrap=True)
    assert c < 1
    assert ours == pytest.approx(c * plain)


@each_mode
def test_max_norm_clips_as_clip_grad_norm_does_after_the_penalty(mode):
    model, twin = Toy(), Toy()
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.1), model, mode, max_norm=0.5)
    hand = ByHand(lambda groups: torch.optim.SGD(groups, lr=0.1), twin, mode)
    for step in range(3):
        loss_of(model, step).backward()
        loss_of(twin, step).backward()
        optimizer.step()
        hand.decide()
        with hand.applied():
            total = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            hand.optimizer.step()
        assert total > 0.5
        optimizer.zero_grad()
        hand.optimizer.zero_grad()
    assert_same_parameters(model, twin)


@each_mode
def test_a_batch_without_a_finite_loss_changes_no_coefficient(mode):
    model, twin = Toy(), Toy()
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.1), model, mode)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for module, o in ((model, optimizer), (twin, plain)):
        inputs, target = batch(0)
        (module(*inputs) - target * float("inf")).mean().backward()
        module.head.weight.grad = torch.zeros_like(module.head.weight)
        for p in module.audio.parameters():
            p.grad = torch.full_like(p, torch.nan)
        o.step()
    assert optimizer.coefficients() == dict.fromkeys(NAMES, 1.0)
    assert optimizer.balance.step == 0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


# Parameters that are frozen, though the optimizer holds them: of BitFit, LoRA, the last layers alone.


def trainable_biases(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))


def trainable_rows(model):
    """Of the large text weight nothing, of audio and visual the weights alone."""
    model.text.weight.requires_grad_(False)
    model.audio.bias.requires_grad_(False)
    model.visual.bias.requires_grad_(False)


@each_mode
@each_rule
@pytest.mark.parametrize("freeze", [trainable_biases, trainable_rows])
def test_frozen_parameters_that_the_optimizer_holds_take_no_part(mode, rule, freeze):
    model, twin = Toy(), Toy()
    freeze(model)
    freeze(twin)
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.1), model, mode, rule)
    hand = ByHand(lambda groups: torch.optim.SGD(groups, lr=0.1), twin, mode, rule)
    assert_same_coefficients(train(model, optimizer, range(5)), hand.train(range(5)))
    assert not np.isnan(optimizer.balance.coherences).any() or rule != "coherence"
    assert_same_parameters(model, twin)


@each_mode
@each_rule
def test_parameters_frozen_or_unfrozen_on_the_way_leave_and_join_their_group(mode, rule):
    model, twin = Toy(), Toy()
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.1), model, mode, rule)
    hand = ByHand(lambda groups: torch.optim.SGD(groups, lr=0.1), twin, mode, rule)
    for freeze in (lambda _: None, trainable_biases, lambda module: module.requires_grad_(True)):
        freeze(model)
        freeze(twin)
        assert_same_coefficients(train(model, optimizer, range(3)), hand.train(range(3)))
    assert_same_parameters(model, twin)


@each_mode
def test_a_parameter_that_is_frozen_after_backward_moves_by_what_its_gradient_asks(mode):
    model = Toy()
    optimizer = put_on(
        torch.optim.SGD(model.parameters(), lr=0.1), model, mode, rules.ByHand(text=0.5)
    )
    loss_of(model, 0).backward()
    model.text.bias.requires_grad_(False)
    for p, factor in ((model.text.bias, 1.0), (model.text.weight, 0.5)):
        start, step = p.detach().clone(), 0.1 * p.grad
        p.expected = start - factor * step
    optimizer.step()
    for p in model.text.parameters():
        torch.testing.assert_close(p.detach(), p.expected)


@each_mode
@each_rule
def test_groups_that_are_all_frozen_for_a_while_do_no_harm(mode, rule):
    model, plain_model = Toy(), Toy()
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.1), model, mode, rule)
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1)
    for module in (model, plain_model):
        for name in NAMES:
            getattr(module, name).requires_grad_(False)
    train(model, optimizer, range(2), observe=False)
    train(plain_model, plain, range(2), observe=False, penalty=optimizer)
    assert_same_parameters(model, plain_model, tolerance=0)
    assert optimizer.balance.step == 0


# Gradients that are written past torch's counter: the same tensor, the same version, other numbers.


def by_data(gradient, values):
    gradient.data.copy_(values)


def by_numpy(gradient, values):
    gradient.numpy()[:] = values.numpy()


@each_mode
@pytest.mark.parametrize("write", [by_data, by_numpy])
def test_gradients_written_past_the_counter_equal_the_oracle_by_hand(mode, write):
    compare(mode, write=write)


# Rules that give what cannot be a coefficient.


class Wrong:
    """From the third step on it answers what it is told to."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, measured):
        return self.answer(measured) if measured.step >= 2 else [0.5] * 3


@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVES)
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda m: -m.norms, ValueError),
        (lambda m: m.norms * np.nan, ValueError),
        (lambda m: [1.0, np.inf, 1.0], ValueError),
        (lambda m: m.norms[:2], ValueError),
        (lambda m: m.norms[None], ValueError),
        (lambda m: m.norms.sum(), ValueError),
        (lambda m: (m.norms, np.eye(3)), TypeError),
        (lambda m: None, TypeError),
    ],
)
def test_what_cannot_be_coefficients_is_refused_by_the_name_of_the_rule(
    name, mode, answer, error, record_property
):
    model = Toy()
    optimizer = put_on(
        getattr(torch.optim, name)(model.parameters(), lr=0.1), model, mode, Wrong(answer)
    )
    train(model, optimizer, range(2), observe=False)
    parameters = [p.detach().clone() for p in model.parameters()]
    state, balance = str(optimizer.state_dict()), optimizer.balance
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    with refused(record_property, error, "`Wrong` must return"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), parameters))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert str(optimizer.state_dict()) == state
    assert optimizer.balance.step == balance.step
    assert optimizer.balance.shares.tolist() == balance.shares.tolist()
    assert len(optimizer.param_groups) == 1


class InPlace:
    """Answers with one array that it goes on writing to."""

    def __init__(self):
        self.answer = np.full(3, 0.5)

    def __call__(self, measured):
        self.answer *= 1 if measured.step == 0 else -1
        return self.answer


@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVES)
def test_what_a_rule_writes_into_its_answer_later_never_reaches_a_parameter(name, mode):
    model = Toy()
    optimizer = put_on(
        getattr(torch.optim, name)(model.parameters(), lr=0.1), model, mode, InPlace(), every=2
    )
    train(model, optimizer, range(2), observe=False)
    loss_of(model, 2).backward()
    with pytest.raises(ValueError, match="`InPlace` must return"):
        optimizer.step()
    optimizer.zero_grad()
    [after] = train(model, optimizer, [3], observe=False)
    assert set(after.values()) == {0.5}


@pytest.mark.parametrize(
    "kind", ["expanded", "the same", "a view of the same", "expanded and the same"]
)
@pytest.mark.parametrize(
    "options",
    [{"apply_to": "gradient"}, {"max_norm": 1.0}, {"apply_to": "gradient", "max_norm": 1.0}],
)
def test_gradients_that_share_memory_are_each_scaled_once(kind, options):
    parameters = [nn.Parameter(torch.ones(3, 3)) for _ in range(4)]
    others = [nn.Parameter(torch.ones(3, 3)) for _ in range(4)]
    for given in (parameters, others):
        own = [torch.full((3, 3), 2.0) for _ in given]
        if given is parameters and "expanded" in kind:
            own = [torch.full((1, 1), 2.0).expand(3, 3) for _ in given]
        if given is parameters and "the same" in kind:
            own = [own[0].view(3, 3) if "view" in kind else own[0] for _ in given]
        for p, g in zip(given, own, strict=True):
            p.grad = g
    for given in (parameters, others):
        optimizer = torch.optim.SGD(given, lr=0.1)
        groups = {"text": given[:2], "audio": given[2:3]}  # the last is in no group
        rule = rules.ByHand(text=0.5, audio=0.25)
        ConflictAwarePenalty(optimizer, groups, rule, **options).step()
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(p.grad, q.grad)
