"""Ten mistakes that are easily made, and what you see then: run ``python examples/mistakes.py``."""

import warnings

import torch
from torch import Tensor, nn

from gradbalance import ConflictAwarePenalty, Recorder, attach, groups_by_name


class Model(nn.Module):
    """Two encoders and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.audio, self.head = nn.Linear(8, 4), nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self) -> Tensor:
        return self.head(10 * self.text(torch.ones(1, 8)) + self.audio(torch.ones(1, 2))).sum()


def make() -> tuple[Model, torch.optim.Optimizer, dict[str, nn.Module]]:
    torch.manual_seed(0)
    model = Model()
    return (
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        {"text": model.text, "audio": model.audio},
    )


def a_generator_that_is_consumed() -> None:
    model, optimizer, _ = make()
    groups = {"text": model.text.parameters(), "audio": model.audio.parameters()}
    print(
        "sizes:", {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()}
    )
    ConflictAwarePenalty(optimizer, groups)


def a_head_in_no_group() -> None:
    model, *_ = make()
    print(groups_by_name(model, text="text", audio="audio"))
    print("This is no error: a joint head belongs in no group, and its training is not touched.")


def tied_weights_in_two_groups() -> None:
    model, _, groups = make()
    model.audio.bias = model.text.bias
    ConflictAwarePenalty(torch.optim.SGD(model.parameters(), lr=0.01), groups)


def a_wrong_name() -> None:
    model, optimizer, _ = make()
    ConflictAwarePenalty(optimizer, groups_by_name(model, text="text", audio="audio_encoder"))


def the_wrapper_to_unscale_and_the_inner_optimizer_to_step() -> None:
    for same in (True, False):
        model, inner, groups = make()
        optimizer = ConflictAwarePenalty(inner, groups)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = model.head.bias.item()
        scaler.scale(model()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer if same else inner)
        print(
            f"one object for both: {same}, so that a bias moved by {model.head.bias.item() - before:.6f}"
        )
    print(
        "This is silent: GradScaler takes them for two optimizers and unscales twice. Use one object for both."
    )


def a_scheduler_of_a_stale_optimizer() -> None:
    model, stale, groups = make()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(stale, gamma=0.1)
    optimizer = ConflictAwarePenalty(torch.optim.SGD(model.parameters(), lr=0.01), groups)
    model().backward()
    optimizer.step()
    scheduler.step()
    print(f"learning rate: {optimizer.param_groups[0]['lr']}, where 0.001 was meant")
    print(
        "Build the scheduler from the optimizer that you wrap, before or after: either way it works."
    )


def observe_forgotten() -> None:
    model, optimizer, groups = make()
    optimizer = ConflictAwarePenalty(optimizer, groups)
    with Recorder(optimizer) as recorder:
        model().backward()
        optimizer.step()
    print(recorder.summary())
    print(
        f"This is no error: without errors the gradients alone decide. Errors: {optimizer.balance.errors.tolist()}"
    )


def an_engine_that_flattens_the_parameters() -> None:
    """DeepSpeed ZeRO does this after construction."""
    _, optimizer, groups = make()
    penalty = attach(optimizer, groups)
    flat = nn.Parameter(torch.zeros(51))
    flat.grad = torch.ones(51)
    optimizer.param_groups[0]["params"] = [flat]
    print(penalty)
    optimizer.step()


def all_parameters_frozen() -> None:
    model, optimizer, groups = make()
    model.text.requires_grad_(False)
    model.audio.requires_grad_(False)
    optimizer = ConflictAwarePenalty(optimizer, groups)
    model().backward()
    optimizer.step()
    print("coefficients:", optimizer.coefficients())


def errors_in_float64_and_errors_of_each_sample() -> None:
    _, optimizer, groups = make()
    optimizer = ConflictAwarePenalty(optimizer, groups)
    optimizer.observe(text=torch.tensor(0.5, dtype=torch.float64), audio=0.25)
    print("float64 is no error; a vector is:")
    optimizer.observe(text=torch.tensor([0.5, 0.7]), audio=torch.tensor([0.2, 0.1]))


MISTAKES = (
    a_generator_that_is_consumed,
    a_head_in_no_group,
    tied_weights_in_two_groups,
    a_wrong_name,
    the_wrapper_to_unscale_and_the_inner_optimizer_to_step,
    a_scheduler_of_a_stale_optimizer,
    observe_forgotten,
    an_engine_that_flattens_the_parameters,
    all_parameters_frozen,
    errors_in_float64_and_errors_of_each_sample,
)


def main() -> None:
    for number, mistake in enumerate(MISTAKES, 1):
        print(f"\n{number}. {mistake.__name__.replace('_', ' ').capitalize()}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                mistake()
            except (TypeError, ValueError, RuntimeError) as error:
                print(f"{type(error).__name__}: {error}")
        for warning in caught:
            print(f"{warning.category.__name__}: {warning.message}")


if __name__ == "__main__":
    main()
