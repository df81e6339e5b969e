"""Training on several ranks through torch's own engines, against the same training in one process by hand."""

import gc
import math
import os
import re
import signal
import warnings
from copy import deepcopy
from functools import partial
from itertools import product
from weakref import ref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as fsdp2
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.testing import assert_close

from gradbalance import ConflictAwarePenalty, Recorder, attach, rules
from tests.contract.branches import (
    CONFLICTS,
    LR,
    NAMES,
    RULES,
    Branches,
    backward,
    batch,
    by_hand,
    full,
    losses,
    penalised,
    share,
    train,
)
from tests.contract.ranks import on_ranks
from tests.old_torch import needs_torch

# Every way through the step: where the coefficient goes, clipping that bites, by errors, by the coherence of successive
# gradients, by norms alone, by a rule with a memory, kept between steps.
VARIANTS = [
    {"apply_to": "update"},
    {"apply_to": "gradient", "max_norm": 0.5},
    {"rule": "coherence", "observing": False},
    {"rule": "own", "observing": False},
    {"rule": "own", "every": 2, "max_norm": 0.5},
]


# The engines. Each function runs on every rank and gives a model, a maker of its optimizer, and what `train` needs.


def data_parallel():
    return DistributedDataParallel(Branches()), {}, {}


def data_parallel_accumulating():
    def accumulate(model, tensors):
        first, second = zip(*(t.chunk(2) for t in tensors), strict=True)
        with model.no_sync():
            loss, errors = losses(model, *first)
            (loss / 2).backward()
        loss, more_errors = losses(model, *second)
        (loss / 2).backward()
        return [errors, more_errors]

    return DistributedDataParallel(Branches()), {}, {"backward": accumulate}


def zero_redundancy(bucket_view):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of what it imports itself

    make = partial(
        ZeroRedundancyOptimizer, optimizer_class=AdamW, parameters_as_bucket_view=bucket_view, lr=LR
    )
    return DistributedDataParallel(Branches()), {"make": make}, {}


def fully_shard(module, **options):
    needs_torch("FSDP2 on the CPU")
    return fsdp2(module, **options)


def shard(model, mesh=None, **options):
    for module in (model.text, model.audio, model.visual, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def fully_sharded():
    return shard(Branches()), {}, {}


def hybrid_sharded():
    return (
        shard(Branches(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))),
        {},
        {},
    )


def partly_sharded():
    """Sharded text beside plain branches, whose gradients are averaged by hand."""

    def average(model, tensors):
        seen = backward(model, tensors)
        for p in (p for part in (model.audio, model.visual, model.head) for p in part.parameters()):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        return seen

    model = Branches()
    fully_shard(model.text)
    return model, {}, {"backward": average}


def parallel_text(model, mesh):
    return parallelize_module(model.text, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def tensor_parallel():
    model = Branches()
    parallel_text(model, init_device_mesh("cpu", (2,)))
    return model, {}, {"part": list}


def sharded_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = Branches()
    parallel_text(model, mesh["tensor"])
    rank = mesh.get_local_rank("data")
    return (
        shard(model, mesh["data"]),
        {},
        {"part": lambda tensors: [t.chunk(2)[rank] for t in tensors]},
    )


def run_variants(engine, late, *args):
    runs = []
    for variant in VARIANTS:
        observing = variant.get("observing", True)
        model, making, training = engine(*args)
        optimizer = penalised(
            model, late=late, **making, **{k: v for k, v in variant.items() if k != "observing"}
        )
        runs.append(train(model, optimizer, observing=observing, **training))
    return runs


# With how many ranks, and how many all_reduces a step takes: one per mesh dimension; without a mesh for errors alone.
@pytest.mark.parametrize(
    ("engine", "late", "args", "ranks", "dimensions"),
    [
        (data_parallel, False, (), 2, 0),
        (data_parallel, True, (), 2, 0),
        (data_parallel_accumulating, False, (), 2, 0),
        (zero_redundancy, False, (False,), 2, 0),
        (zero_redundancy, False, (True,), 2, 0),
        (fully_sharded, False, (), 2, 1),
        (fully_sharded, True, (), 2, 1),
        (partly_sharded, False, (), 2, 1),
        (tensor_parallel, False, (), 2, 1),
        (hybrid_sharded, False, (), 4, 2),
        (
            sharded_tensor_parallel,
            False,
            (),
            4,
            3,
        ),  # a mesh of two dimensions, and one of them alone
    ],
)
def test_distributed_training_equals_training_in_one_process(engine, late, args, ranks, dimensions):
    found = on_ranks(run_variants, ranks, engine, late, *args)
    for number, variant in enumerate(VARIANTS):
        expected = by_hand(late=late, **variant)
        assert any(abs(c - 1) > 0.1 for step in expected.coefficients for c in step)
        measured = [step % variant.get("every", 1) == 0 for step in range(3)]
        for run in (of_rank[number] for of_rank in found):
            assert run.coefficients == found[0][number].coefficients
            for step in range(3 - late):  # a late step shows what the one before it measured
                if measured[step]:
                    assert_close(run.norms[step + late], expected.norms[step], rtol=1e-6, atol=0)
            assert_close(run.coefficients, expected.coefficients, rtol=1e-6, atol=0)
            if variant.get("rule") == "coherence":  # of float32 entries
                coherences = expected.coherences[: 3 - late]
                assert_close(run.coherences[late:], coherences, rtol=0, atol=1e-6, equal_nan=True)
            assert_close(run.parameters, expected.parameters, rtol=1e-6, atol=1e-12)
            assert run.all_reduces == [
                dimensions or (m and variant.get("observing", True)) for m in measured
            ]


def uneven_shards():
    model = shard(Branches())
    optimizer = penalised(model)
    backward(model, share(batch(0)))
    optimizer.step()
    return model.visual.weight.to_local().numel(), optimizer.balance.norms[2].item()


def test_distributed_a_rank_that_holds_nothing_of_a_group_knows_its_norm():
    (some, norm), (nothing, same_norm) = on_ranks(uneven_shards, 2)
    assert (some, nothing) == (6, 0)
    assert norm == same_norm > 0


def coherences_of_large_parameters():
    """More entries than are compared: of a DTensor, and of the same tensor on each rank."""
    mesh = init_device_mesh("cpu", (2,))

    def measured(distribute):
        shapes = {"large": (1021, 1000), "narrow": (4, 9000), "small": (7, 3)}
        groups = {
            name: [nn.Parameter(distribute(torch.zeros(shape)))] for name, shape in shapes.items()
        }
        optimizer = ConflictAwarePenalty(
            SGD([p for [p] in groups.values()], lr=LR), groups, rules.Watch()
        )
        for step in range(2):
            for number, (name, shape) in enumerate(shapes.items()):
                draw = torch.Generator().manual_seed(number)
                common, own = (torch.randn(shape, generator=draw) for _ in range(2))
                groups[name][0].grad = distribute(common + step * own)
            optimizer.step()
        return optimizer.balance.coherences.tolist()

    return measured(lambda t: t), measured(lambda t: distribute_tensor(t, mesh, [Shard(0)]))


def test_distributed_ranks_bring_their_parts_of_the_same_sketch():
    for whole, sharded in on_ranks(coherences_of_large_parameters, 2):
        assert_close(sharded, whole, rtol=1e-6, atol=0)
        assert whole[:2] == pytest.approx([0.5**0.5] * 2, abs=0.05)


def gradients_on_one_rank(rule):
    model = shard(Branches())
    optimizer = penalised(model, rule=rule)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, share(batch(step)))
        if dist.get_rank() == 1 and step == 1:
            model.zero_grad()
        optimizer.step()
    return optimizer.balance.norms.tolist(), optimizer.coefficients()


@pytest.mark.parametrize("rule", ["conflicts", "coherence"])
def test_distributed_a_rank_without_gradients_holds_up_none_and_decides_as_they_do(rule):
    (norms, coefficients), (same_norms, same_coefficients) = on_ranks(
        gradients_on_one_rank, 2, rule
    )
    assert norms == same_norms
    assert min(norms) > 0
    assert coefficients == same_coefficients


def mixed_precision(policy, dtype):
    model = shard(Branches().to(dtype), mp_policy=policy)
    optimizer = penalised(model, max_norm=0.5)
    x, y = share(batch(0))
    backward(model, (x.to(policy.param_dtype), y.to(policy.param_dtype)))
    gradients = {
        name: [full(p.grad).double() for p in module.parameters()]
        for name, module in model.groups().items()
    }
    everything = torch.cat([full(p.grad).double().flatten() for p in model.parameters()])
    optimizer.step()
    clipped = torch.cat([full(p.grad).double().flatten() for p in model.parameters()])
    by_hand = [
        torch.cat([g.flatten() for g in group]).norm().item() for group in gradients.values()
    ]
    return (
        optimizer.balance.norms.tolist(),
        by_hand,
        (clipped.norm() / everything.norm()).item(),
        0.5 / everything.norm(),
    )


def mixed_precisions(policy):
    return {dtype: mixed_precision(policy, dtype) for dtype in (torch.float32, torch.bfloat16)}


def test_distributed_norms_of_mixed_precision_are_those_of_the_whole_gradients():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for found in on_ranks(mixed_precisions, 2, policy):
        for dtype, (norms, expected, clip, expected_clip) in found.items():
            assert_close(norms, expected, rtol=1e-6, atol=0)
            assert clip == pytest.approx(
                float(expected_clip), rel=1e-5 if dtype == torch.float32 else 1e-2
            )


def partial_gradients():
    """Sequence parallelism leaves each rank a part of the sum that is the gradient of a replicated parameter."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.ModuleDict({"audio": nn.LayerNorm(6), "visual": nn.Linear(6, 4)}).double()
    nn.init.normal_(model["audio"].weight)
    whole = deepcopy(model)
    parallelize_module(model, mesh, {"audio": SequenceParallel(sequence_dim=0)})
    x, _ = batch(0)
    (
        10 * model["audio"](share([x])[0]).full_tensor().pow(2).mean()
        + model["visual"](x).pow(2).mean()
    ).backward()
    (10 * whole["audio"](x).pow(2).mean() + whole["visual"](x).pow(2).mean()).backward()
    sgd, rule = SGD(model.parameters(), lr=LR), rules.ConflictAware(eta=0.1)
    optimizer = ConflictAwarePenalty(sgd, dict(model.items()), rule, apply_to="gradient")
    optimizer.step()
    assert any(p.is_partial() for p in model["audio"].weight.grad.placements)
    by_hand = [
        torch.cat([p.grad.flatten() for p in m.parameters()]).norm().item() for m in whole.values()
    ]
    scaled = (full(model["audio"].weight.grad) / whole["audio"].weight.grad).tolist()
    return optimizer.balance.norms.tolist(), by_hand, scaled, optimizer.coefficients()["audio"]


def test_distributed_partial_gradients_are_summed_before_their_norm_is_taken():
    for norms, expected, scaled, coefficient in on_ranks(partial_gradients, 2):
        assert_close(norms, expected, rtol=1e-6, atol=0)
        assert coefficient == 0.1
        assert_close(scaled, [0.1] * 6)


def errors_by_rank():
    rank, found = dist.get_rank(), {}
    groups = [dist.new_group([r]) for r in range(2)]
    for sharded in (False, True):
        for own_group in (False, True):
            model = shard(Branches()) if sharded else DistributedDataParallel(Branches())
            optimizer = penalised(model, process_group=groups[rank] if own_group else None)
            backward(model, share(batch(0)))
            optimizer.observe(text=1.0 + rank, **({"audio": 4.0} if rank == 0 else {"visual": 8.0}))
            optimizer.step()
            found[sharded, own_group] = optimizer.balance.errors.tolist()
    return found


def test_distributed_errors_are_averaged_over_those_ranks_of_the_process_group_that_name_the_group():
    first, second = on_ranks(errors_by_rank, 2)
    for sharded in (False, True):
        assert first[sharded, False] == second[sharded, False] == [1.5, 4.0, 8.0]
        assert_close(first[sharded, True], [1.0, 4.0, math.nan], equal_nan=True)
        assert_close(second[sharded, True], [2.0, math.nan, 8.0], equal_nan=True)


def nan_on_one_rank():
    model = shard(Branches())
    optimizer = penalised(model, max_norm=1.0)
    train(model, optimizer, range(2))
    before = optimizer.balance
    backward(model, share(batch(2)))
    if dist.get_rank() == 0:
        model.visual.weight.grad.to_local().fill_(math.nan)
    optimizer.step()
    return before.shares.tolist(), optimizer.balance.shares.tolist(), optimizer.coefficients()


def test_distributed_nan_on_one_rank_makes_the_step_not_count_on_any():
    for before, after, coefficients in on_ranks(nan_on_one_rank, 2):
        assert after == before
        assert set(coefficients.values()) == {1.0}


def attached_before_sharding():
    """As accelerate does it: the optimizer is there first, and its parameters are swapped in place."""
    runs = {}
    for rule in ("conflicts", "coherence"):
        model = Branches()
        optimizer = penalised(model, rule=rule)
        names, whole = zip(*((name, ref(p)) for name, p in model.named_parameters()), strict=True)
        shard(model)
        parameters = dict(model.named_parameters())
        optimizer.param_groups[0]["params"] = [parameters[name] for name in names]
        gc.collect()
        kept = [name for name, p in zip(names, whole, strict=True) if p() is not None]
        runs[rule] = train(model, optimizer), kept
    return runs


def test_distributed_parameters_swapped_for_sharded_ones_keep_their_groups_and_are_let_go():
    for runs in on_ranks(attached_before_sharding, 2):
        for rule, (run, kept) in runs.items():
            expected, loose = by_hand(rule=rule), rule == "coherence"  # of float32 entries
            assert_close(
                run.coefficients, expected.coefficients, rtol=1e-6, atol=1e-6 if loose else 0
            )
            assert_close(
                run.parameters, expected.parameters, rtol=1e-6, atol=1e-7 if loose else 1e-12
            )
            assert kept == []


def sharded_if_ranks():
    model = Branches()
    return shard(model) if dist.get_world_size() > 1 else model


def distributed_data_parallel():
    return DistributedDataParallel(Branches())


def save(folder, build, rule, steps, then=lambda *_: None):
    model = build()
    optimizer = penalised(model, rule=rule)
    train(model, optimizer, range(steps))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/{rule}")
    then(model, optimizer)


def load(folder, build, rule, steps):
    model = build()
    optimizer = penalised(model, rule=rule)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/{rule}")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return train(model, optimizer, steps)


def save_all(folder):
    for rule in RULES:
        save(folder, sharded_if_ranks, rule, 2)


def load_all(folder):
    return {rule: load(folder, sharded_if_ranks, rule, range(2, 4)) for rule in RULES}


@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2)])
def test_distributed_checkpoints_resume_on_another_number_of_ranks(saving, loading, tmp_path):
    on_ranks(save_all, saving, str(tmp_path))
    for runs in on_ranks(load_all, loading, str(tmp_path)):
        for rule, run in runs.items():
            expected, loose = by_hand(steps=4, rule=rule), rule == "coherence"  # of float32 entries
            assert_close(
                run.coefficients, expected.coefficients[2:], rtol=1e-6, atol=1e-6 if loose else 0
            )
            assert_close(
                run.parameters, expected.parameters, rtol=1e-6, atol=1e-7 if loose else 1e-12
            )


def die(model, optimizer):
    """Half a step further than what was saved, and no more."""
    backward(model, share(batch(2)))
    optimizer.step()
    os.kill(os.getpid(), signal.SIGKILL)


def saved_and_killed(folder, build):
    save(folder, build, "coherence", 2)
    save(folder, build, "own", 2, die)


def resumed(folder, build):
    return [load(folder, build, rule, range(2, 5)) for rule in ("coherence", "own")]


def unbroken(build):
    runs = []
    for rule in ("coherence", "own"):
        model = build()
        runs.append(train(model, penalised(model, rule=rule), range(5)))
    return runs


@pytest.mark.parametrize("build", [distributed_data_parallel, sharded_if_ranks])
def test_distributed_a_killed_run_resumes_bit_for_bit(build, tmp_path):
    with pytest.raises(RuntimeError, match="died"):
        on_ranks(saved_and_killed, 2, str(tmp_path), build)
    after, whole = on_ranks(resumed, 2, str(tmp_path), build), on_ranks(unbroken, 2, build)
    for resumed_runs, runs in zip(after, whole, strict=True):
        for ours, expected in zip(resumed_runs, runs, strict=True):
            assert ours.coefficients == expected.coefficients[2:]
            assert_close(ours.parameters, expected.parameters, rtol=0, atol=0)


def resume_zero_redundancy():
    model, making, _ = zero_redundancy(False)
    optimizer = penalised(model, **making)
    train(model, optimizer, range(2))
    optimizer.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    resumed = penalised(model, **making)
    resumed.load_state_dict(saved[0])
    return train(model, resumed, range(2, 4))


def test_distributed_a_consolidated_checkpoint_of_zero_redundancy_resumes():
    expected = by_hand(steps=4)
    for run in on_ranks(resume_zero_redundancy, 2):
        assert_close(run.coefficients, expected.coefficients[2:], rtol=1e-6, atol=0)
        assert_close(run.parameters, expected.parameters, rtol=1e-6, atol=1e-12)


def record_zero_redundancy():
    model, making, _ = zero_redundancy(False)
    optimizer = making["make"](model.parameters())
    penalty = attach(optimizer, model.module.groups(), CONFLICTS)
    recorder = Recorder(optimizer)
    losses(model, *share(batch(0)))[0].backward()
    optimizer.step()
    return recorder.to_dict()["norms"][0].tolist(), penalty.balance.norms.tolist()


def test_distributed_a_recorder_finds_the_penalty_on_zero_redundancy():
    for recorded, norms in on_ranks(record_zero_redundancy, 2):
        assert recorded == norms


def noise(engine, seed):
    model, _, _ = engine()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return train(model, penalised(model, noise=1.0, generator=generator)).parameters


def test_distributed_noise_of_one_seed_is_the_same_on_all_ranks():
    first, second = on_ranks(noise, 2, data_parallel, 0)
    assert_close(first, second, rtol=0, atol=0)
    assert (first["audio.weight"] - by_hand().parameters["audio.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("engine", "seed", "message"),
    [(data_parallel, None, "`generator` must be given"), (fully_sharded, 0, "`noise`")],
)
def test_distributed_noise_that_would_differ_between_ranks_is_refused(engine, seed, message):
    with pytest.raises(AssertionError, match=message):
        on_ranks(noise, 2, engine, seed)


def flattened(use_orig_params, nested, attached_first):
    wrap = partial(
        FullyShardedDataParallel, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    model = Branches()
    optimizer = penalised(model) if attached_first else None
    if nested:
        for name in NAMES:
            setattr(model, name, wrap(getattr(model, name)))
    wrapped = wrap(model)
    optimizer = optimizer or ConflictAwarePenalty(AdamW(wrapped.parameters()), model.groups())
    backward(wrapped, share(batch(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(100):
            optimizer.step()


def flattened_in_every_way():
    found = {}
    for ways in product((False, True), repeat=3):
        try:
            flattened(*ways)
        except Exception as error:
            found[ways] = f"{type(error).__name__}: {error}"
    return found


FLATTENED = {  # by use_orig_params and whether the penalty was there first
    (True, False): "RuntimeError: `groups` must hold parameters with gradients of their own.*FSDP1",
    (True, True): "RuntimeError: .*FSDP1",
    (False, False): "(RuntimeError|ValueError): `groups.*FSDP1",
    # The optimizer holds what is not trained any more, of which torch itself says nothing.
    (
        False,
        True,
    ): "UserWarning: No step has counted for 100 .* No parameter of `text`, `audio`, `visual` has a grad",
}


def test_distributed_parameters_flattened_by_fsdp1_are_refused(record_property):
    for found in on_ranks(flattened_in_every_way, 2):
        assert len(found) == 8
        for (use_orig_params, _, attached_first), message in found.items():
            assert re.match(FLATTENED[use_orig_params, attached_first], message)
            record_property("refused", message)


def overlapping():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(Branches())
    make = partial(ZeroRedundancyOptimizer, optimizer_class=AdamW, overlap_with_ddp=True, lr=LR)
    penalised(model, make=make)


def test_distributed_an_optimizer_that_steps_during_backward_is_refused():
    with pytest.raises(
        AssertionError, match="ValueError: `optimizer` must step after the backward pass"
    ):
        on_ranks(overlapping, 2)


def fail_on_one_rank():
    if dist.get_rank() == 1:
        raise ValueError("on purpose")
    dist.barrier()


def test_distributed_a_failure_on_one_rank_fails_the_test():
    with pytest.raises(AssertionError, match="Rank 1 failed"):
        on_ranks(fail_on_one_rank, 2)


def run_example():
    from examples import fsdp2

    return fsdp2.main(steps=2)


def test_distributed_the_example_of_fsdp2_runs_with_the_same_coefficients_on_all_ranks():
    first, second = on_ranks(run_example, 2)
    assert first == second
    assert set(first) == {"audio", "visual"}
