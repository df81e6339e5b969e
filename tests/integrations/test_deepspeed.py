"""DeepSpeed ZeRO, which keeps no gradient per parameter: refused by name, and the recipe that works."""

from functools import partial

from torch.optim import SGD
from torch.testing import assert_close

from gradbalance import attach
from tests import needs
from tests.contract.branches import (
    CONFLICTS,
    LR,
    SMOOTHING,
    Branches,
    Run,
    adamw,
    batch,
    by_hand,
    losses,
    share,
)
from tests.contract.ranks import on_ranks

deepspeed = needs("deepspeed")
# Else it compiles collectives of its own for the CPU, for two minutes; without them it takes those of gloo.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_engine(stage, make, penalised_first=None):
    model = Branches().float()
    groups = {name: list(module.parameters()) for name, module in model.groups().items()}
    optimizer = make(
        [{"params": part} for part in [*groups.values(), list(model.head.parameters())]]
    )
    penalty = attach(SGD(model.parameters()), groups, CONFLICTS, smoothing=SMOOTHING)
    if penalised_first:
        attach(optimizer, groups)
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
    }  # else stage 3 would keep such small ones whole
    config = {
        "gradient_clipping": 0.0,  # 1 unless told otherwise
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, groups, penalty


def deepspeed_backward(engine, step):
    loss, errors = losses(engine, *(t.float() for t in share(batch(step))))
    engine.backward(loss)
    return errors


def deepspeed_refusals():
    messages = []
    for stage in (1, 2, 3):
        engine, *_ = deepspeed_engine(stage, adamw, penalised_first=True)
        deepspeed_backward(engine, 0)
        try:
            engine.step()
        except RuntimeError as error:
            messages.append(str(error))
        engine, groups, _ = deepspeed_engine(stage, adamw)
        try:
            attach(engine.optimizer, groups)
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    return messages


def test_deepspeed_zero_is_refused():
    for messages in on_ranks(deepspeed_refusals, 2, timeout=400.0):
        assert len(messages) == 6
        assert all(
            "DeepSpeed ZeRO" in message and "coefficients_for" in message for message in messages
        )


def deepspeed_recipe(stage, apply_to):
    from deepspeed import zero

    from examples.deepspeed_zero import coefficients, scale_gradients, scale_learning_rates

    engine, groups, penalty = deepspeed_engine(
        stage, partial(SGD, lr=LR) if apply_to == "gradient" else adamw
    )
    run = Run([], [], [], {}, [])
    for step in range(3):
        errors = deepspeed_backward(engine, step)
        factors = coefficients(penalty, groups, **errors)
        if apply_to == "gradient":
            scale_gradients(groups, factors)
        else:
            scale_learning_rates(engine.optimizer, groups, factors, LR)
        engine.step()
        run.coefficients.append(list(factors.values()))
    with zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        run.parameters.update((n, p.detach().double()) for n, p in engine.module.named_parameters())
    return run


def deepspeed_recipes():
    return {
        (stage, mode): deepspeed_recipe(stage, mode)
        for stage in (1, 2, 3)
        for mode in ("gradient", "update")
    }


def test_the_deepspeed_recipe_equals_training_in_one_process():
    expected = {
        "gradient": by_hand(apply_to="gradient", make=SGD),
        "update": by_hand(apply_to="update"),
    }
    for runs in on_ranks(deepspeed_recipes, 2, timeout=400.0):
        for (_, mode), run in runs.items():
            assert_close(
                run.coefficients, expected[mode].coefficients, rtol=1e-5, atol=0
            )  # in float32
            assert_close(run.parameters, expected[mode].parameters, rtol=1e-5, atol=1e-6)


def run_example():
    from examples import deepspeed_zero

    return deepspeed_zero.main(steps=2, stage=3)


def test_the_example_runs_with_the_same_coefficients_on_all_ranks():
    first, second = on_ranks(run_example, 2, timeout=400.0)
    assert first == second
    assert set(first) == {"audio", "visual"}
