"""Host reads and compiled graphs: no read in gradient mode, one in update mode, at most one graph more."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradbalance._engine import errors, state
from gradbalance._gradients import coherence, layout
from tests.contract.optimizers import TORCH, cancels
from tests.contract.oracle import (
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    errors_at,
    loss_of,
    put_on,
    train,
)
from tests.contract.own_rules import RULES

pytestmark = cancels

ERRORS = errors_at(0).items()
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")


class Reads:
    """Counts what would wait for a device: a value that leaves a tensor, by operator or by Python method."""

    def __init__(self):
        self.found = []
        counter = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                name = getattr(function, "__name__", "")
                if name in READS:
                    counter.found.append(name)
                return function(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function.name()
                if name in ("aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"):
                    counter.found.append(name)
                return function(*args, **(kwargs or {}))

        self.modes = Functions(), Operators()

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


def reads_of_a_step(model, optimizer, errors=None):
    """What the third step reads, the state of the optimizer being set up."""
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if errors is not None:
            optimizer.observe(**errors)
        with Reads() as reads:
            optimizer.step()
    return reads.found


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for module in (layout, coherence, errors, state):
        monkeypatch.setattr(module, "on_host", lambda device: False)


@pytest.mark.parametrize(
    ("rule", "told"), [*((rule, None) for rule in RULES), ("conflicts", {n: torch.tensor(e) for n, e in ERRORS})]
)
@pytest.mark.parametrize(
    ("case", "mode"), [pytest.param(c, m, id=f"{c}-{m}") for c in TORCH if not c.variant for m in c.modes]
)
def test_a_step_reads_nothing_in_gradient_mode_and_once_in_update_mode(case, mode, rule, told):
    plain, model = Toy(case.bias), Toy(case.bias)
    optimizer = put_on(case.make(model.parameters()), model, mode, rule)
    ours = reads_of_a_step(model, optimizer, told)
    allowed = (mode == "update") + (rule == "own")  # a rule with a memory is asked only at steps that count
    assert len(ours) == len(reads_of_a_step(plain, case.make(plain.parameters()))) + allowed


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"noise": 0.1}, {"every": 2}, {"window": (1, None)}])
def test_no_option_reads_in_gradient_mode(options):
    model = Toy()
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.1), model, "gradient", **options)
    assert reads_of_a_step(model, optimizer) == []


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_coefficients_out_of_range_make_a_step_not_count_where_looking_would_be_a_read(value):
    model, plain_model = Toy(), Toy()
    optimizer = put_on(
        torch.optim.SGD(model.parameters(), lr=0.1), model, "gradient", lambda m: m.norms.new_full((3,), value)
    )
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1)
    assert reads_of_a_step(model, optimizer) == reads_of_a_step(plain_model, plain) == []
    assert_same_parameters(model, plain_model, tolerance=0)
    assert optimizer.balance.step.item() == 0
    assert optimizer.balance.shares.isnan().all()
    assert set(optimizer.coefficients().values()) == {1.0}


@pytest.mark.parametrize("every", [1, 2])
def test_a_second_step_on_the_same_gradients_does_not_count_where_looking_would_be_a_read(every):
    model, twin = Toy(), ByHand(lambda groups: torch.optim.SGD(groups, lr=0.02), Toy(), "gradient")
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.02), model, "gradient", every=every)
    loss_of(model, 0).backward()
    loss_of(twin.model, 0).backward()
    for _ in range(3):
        optimizer.step()
    twin.step()
    twin.optimizer.step()
    twin.optimizer.step()
    assert optimizer.balance.step.item() == 1
    assert_same_parameters(model, twin.model)


def test_a_learning_rate_in_a_tensor_is_scaled_without_a_read():
    def make(params):
        return torch.optim.AdamW(params, lr=torch.tensor(0.02), fused=True)

    model, twin = Toy(), ByHand(make, Toy(), "update")
    optimizer = put_on(make(model.parameters()), model)
    lr = optimizer.param_groups[0]["lr"]
    assert_same_coefficients(train(model, optimizer, range(4)), twin.train(range(4)))
    assert_same_parameters(model, twin.model)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.02)
    loss_of(model, 4).backward()
    with Reads() as reads:
        optimizer.step()
    assert reads.found == []


def graphs_of_six_steps(optimizer, model):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    step = torch.compile(optimizer.step, backend=backend)
    for i in range(6):
        loss_of(model, i).backward()
        step()
        optimizer.zero_grad()
    return len(compiled)


# In update mode a float learning rate would be a constant of the graph, which changes at every step.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    ("mode", "lr", "foreach"),
    [("gradient", 0.02, True), ("gradient", 0.02, False), ("gradient", "tensor", False), ("update", "tensor", False)],
)
def test_a_compiled_step_has_at_most_one_graph_more(mode, lr, foreach):
    def make(params):
        return torch.optim.AdamW(params, lr=torch.tensor(0.02) if lr == "tensor" else lr, foreach=foreach)

    plain, model, twin = Toy(), Toy(), ByHand(make, Toy(), mode)
    optimizer = put_on(make(model.parameters()), model, mode)
    assert graphs_of_six_steps(optimizer, model) <= graphs_of_six_steps(make(plain.parameters()), plain) + 1
    assert_same_coefficients([optimizer.coefficients()], twin.train(range(6), observe=False)[-1:])
    assert_same_parameters(model, twin.model)
