"""Graphs of a step: at most one more when it is compiled, and none that is captured."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gradbalance import attach, rules
from tests.contract.optimizers import cancels
from tests.contract.oracle import (
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    loss_of,
    put_on,
    refused,
    train,
)


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


# By rate only with a tensor: a float learning rate would be a constant of the graph, which changes at every step.
@cancels
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch's own
@pytest.mark.parametrize(
    ("mode", "lr"), [("update", torch.tensor(0.02)), ("displacement", 0.02), ("gradient", 0.02)]
)
def test_a_compiled_step_has_at_most_one_graph_more(mode, lr):
    def make(params):
        return torch.optim.AdamW(
            params, lr=lr.clone() if isinstance(lr, torch.Tensor) else lr, foreach=False
        )

    plain, model, twin = Toy(), Toy(), ByHand(make, Toy(), mode)
    optimizer = put_on(make(model.parameters()), model, mode)
    assert (
        graphs_of_six_steps(optimizer, model)
        <= graphs_of_six_steps(make(plain.parameters()), plain) + 1
    )
    assert_same_coefficients([optimizer.coefficients()], twin.train(range(6), observe=False)[-1:])
    assert_same_parameters(model, twin.model)


def test_a_learning_rate_in_a_tensor_is_scaled_and_stays_the_same_tensor():
    def make(params):
        return torch.optim.AdamW(params, lr=torch.tensor(0.02), fused=True)

    model, twin = Toy(), ByHand(make, Toy(), "update")
    optimizer = put_on(make(model.parameters()), model)
    lr = optimizer.param_groups[0]["lr"]
    assert_same_coefficients(train(model, optimizer, range(4)), twin.train(range(4)))
    assert_same_parameters(model, twin.model)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.02)


@pytest.mark.parametrize("mode", ["update", "displacement", "gradient"])
def test_a_step_inside_a_capture_is_refused_before_anything_is_done(
    mode, monkeypatch, record_property
):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():  # parameters on a GPU that is not there
        parameters = {
            name: [torch.ones(2, device="cuda", requires_grad=True)] for name in ("text", "audio")
        }
        optimizer = torch.optim.SGD([p for [p] in parameters.values()], lr=0.1)
        penalty = attach(optimizer, parameters, rules.ByHand(text=0.5), apply_to=mode)
        for [p] in parameters.values():
            p.grad = torch.ones_like(p)
        with refused(
            record_property, RuntimeError, "outside a CUDA graph capture.*call `step\\(\\)` outside"
        ):
            optimizer.step()
    assert penalty.balance.step == 0
    assert len(optimizer.param_groups) == 1
