"""Training on several ranks through torch's own engines, against the same training in one process by hand."""

import math
import warnings
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_workers import on_ranks
from gradbalance._settings import Settings
from gradbalance._sketch import Sketch
from reference import ReferenceRule
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.functional import cosine_similarity
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.testing import assert_close

from gradbalance import ConflictAwarePenalty, Recorder, attach

NAMES = ("text", "audio", "visual")
RULE = {"eta": 0.3, "threshold": 1.2, "smoothing": 0.5}
LR = 0.01
# Every way through the step: where the coefficient goes, each norm, clipping that bites, by errors, by the agreement of
# successive gradients, by norms alone.
VARIANTS = [
    {"apply_to": "update"},
    {"apply_to": "gradient", "max_norm": 0.5},
    {"apply_to": "update", "max_norm": 0.5, "norm": "rms"},
    {"apply_to": "update", "observing": False, "agreement": 1.0},
    {"apply_to": "gradient", "norm": "relative", "observing": False},
]


class Branches(nn.Module):
    """Branches of uneven strength; `visual` has one row only, so that with two ranks one holds nothing of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.audio = nn.Linear(6, 3)
        self.visual = nn.Linear(6, 1)
        self.head = nn.Linear(8, 1)
        self.double()

    def forward(self, x):
        features = [3 * self.text(x), self.audio(x), 0.3 * self.visual(x)]
        return self.head(torch.cat(features, 1)), [f.mean(1) for f in features]

    def groups(self):
        return {name: getattr(self, name) for name in NAMES}


def batch(step):
    """The global batch of a step: 8 samples."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x.sum(1, keepdim=True).tanh()


def losses(model, x, y):
    """The loss, and the error of each branch on its own."""
    prediction, alone = model(x)
    return (prediction - y).square().mean(), {n: (a - y[:, 0]).abs().mean() for n, a in zip(NAMES, alone, strict=True)}


class Run(NamedTuple):
    """What a training run shows: figures per step, and the parameters at the end."""

    norms: list
    agreements: list
    coefficients: list
    parameters: dict
    all_reduces: list  # how many the optimizer's step took, per step


def by_hand(steps=3, *, apply_to="update", norm="l2", max_norm=None, observing=True, agreement=None, make=AdamW):
    """Training in one process without the library: a plain optimizer, and the rule as slow loops."""
    model, rule, run = Branches(), ReferenceRule(Settings(**RULE, agreement=agreement)), Run([], [], [], {}, [])
    last = None
    parts = [list(getattr(model, name).parameters()) for name in (*NAMES, "head")]
    optimizer = make([{"params": part} for part in parts], lr=LR)
    for step in range(steps):
        optimizer.zero_grad()
        loss, errors = losses(model, *batch(step))
        loss.backward()
        gradients = [torch.cat([p.grad.flatten() for p in part]) for part in parts[:3]]
        norms = [g.norm().item() for g in gradients]
        cosines = [cosine_similarity(g, old, 0).item() for g, old in zip(gradients, last or gradients, strict=True)]
        if norm == "rms":
            norms = [n / math.sqrt(sum(p.numel() for p in part)) for n, part in zip(norms, parts, strict=False)]
        if norm == "relative":
            norms = [
                n / torch.cat([p.flatten() for p in part]).norm().item() for n, part in zip(norms, parts, strict=False)
            ]
        observed = [e.item() for e in errors.values()] if observing else None
        factors = rule.step(norms, observed, cosines if last else [None] * 3)
        last = gradients
        run.agreements.append([rule.agreements.get(m, math.nan) for m in range(3)])
        run.norms.append(norms)
        run.coefficients.append(factors)
        if apply_to == "gradient":
            for part, c in zip(parts, factors, strict=False):
                for p in part:
                    p.grad *= c
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if apply_to == "update":
            for group, c in zip(optimizer.param_groups, factors, strict=False):
                group["lr"] = LR * c
        optimizer.step()
    run.parameters.update((n, p.detach()) for n, p in model.named_parameters())
    return run


def share(tensors):
    """This rank's part of a batch."""
    return [t.chunk(dist.get_world_size())[dist.get_rank()] for t in tensors]


def backward(model, tensors):
    loss, errors = losses(model, *tensors)
    loss.backward()
    return [errors]


def full(t):
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def train(model, optimizer, steps=range(3), *, part=share, backward=backward, observing=True):
    """Train on this rank's part of the batches with an optimizer that has the penalty on."""
    bare, run = getattr(model, "module", model), Run([], [], [], {}, [])
    for step in steps:
        optimizer.zero_grad()
        seen = backward(model, part(batch(step)))
        for errors in seen if observing else []:
            optimizer.observe(**errors)
        with CommDebugMode() as calls:
            optimizer.step()
        run.norms.append(optimizer.balance.norms.tolist())
        run.agreements.append(optimizer.balance.agreements.tolist())
        run.coefficients.append(list(optimizer.coefficients().values()))
        run.all_reduces.append(sum(n for call, n in calls.get_comm_counts().items() if "reduce" in str(call)))
    run.parameters.update((n, full(p)) for n, p in bare.named_parameters())
    return run


def adamw(parameters):
    return AdamW(parameters, lr=LR)


def penalised(model, make=adamw, agreement=None, **options):
    groups = getattr(model, "module", model).groups()
    return ConflictAwarePenalty(make(model.parameters()), groups, **RULE, agreement=agreement, **options)


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

    make = partial(ZeroRedundancyOptimizer, optimizer_class=AdamW, parameters_as_bucket_view=bucket_view, lr=LR)
    return DistributedDataParallel(Branches()), {"make": make}, {}


def shard(model, mesh=None, **options):
    for module in (model.text, model.audio, model.visual, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def fully_sharded():
    return shard(Branches()), {}, {}


def hybrid_sharded():
    return shard(Branches(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))), {}, {}


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
    return shard(model, mesh["data"]), {}, {"part": lambda tensors: [t.chunk(2)[rank] for t in tensors]}


def run_variants(engine, *args):
    runs = []
    for variant in VARIANTS:
        observing = variant.get("observing", True)
        model, making, training = engine(*args)
        optimizer = penalised(model, **making, **{k: v for k, v in variant.items() if k != "observing"})
        runs.append(train(model, optimizer, observing=observing, **training))
    return runs


# With how many ranks, and how many all_reduces a step takes: one per mesh dimension; without a mesh for errors alone.
@pytest.mark.parametrize(
    ("engine", "args", "ranks", "dimensions"),
    [
        (data_parallel, (), 2, 0),
        (data_parallel_accumulating, (), 2, 0),
        (zero_redundancy, (False,), 2, 0),
        (zero_redundancy, (True,), 2, 0),
        (fully_sharded, (), 2, 1),
        (partly_sharded, (), 2, 1),
        (tensor_parallel, (), 2, 1),
        (hybrid_sharded, (), 4, 2),
        (sharded_tensor_parallel, (), 4, 3),  # a mesh of two dimensions, and one of them alone
    ],
)
def test_distributed_training_equals_training_in_one_process(engine, args, ranks, dimensions):
    found = on_ranks(run_variants, ranks, engine, *args)
    for number, variant in enumerate(VARIANTS):
        expected = by_hand(**variant)
        assert min(min(c) for c in expected.coefficients) < 0.9
        for run in (of_rank[number] for of_rank in found):
            assert run.coefficients == found[0][number].coefficients
            assert_close(run.norms, expected.norms, rtol=1e-6, atol=0)
            assert_close(run.agreements, expected.agreements, rtol=0, atol=1e-6, equal_nan=True)  # of float32 entries
            assert_close(run.coefficients, expected.coefficients, rtol=1e-6, atol=0)
            assert_close(run.parameters, expected.parameters, rtol=1e-6, atol=1e-12)
            messages = dimensions * (2 if variant.get("norm") == "relative" else 1)  # parameters have norms, too
            assert run.all_reduces == [messages or variant.get("observing", True)] * 3


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


def thinned_sketch():
    mesh, cpu = init_device_mesh("cpu", (2,)), torch.device("cpu")
    whole = [nn.Parameter(torch.zeros(shape)) for shape in ((1020, 1000), (7, 3))]
    shards = [nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in whole]
    for p, q in zip(whole, shards, strict=True):
        p.grad = torch.arange(1.0, p.numel() + 1).view(p.shape)
        q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
    expected, taken = (Sketch([[p] for p in group], cpu).take() for group in (whole, shards))
    dist.all_reduce(taken[mesh])
    return len(taken[mesh]), taken[mesh].equal(expected[None])


def test_distributed_ranks_bring_their_parts_of_the_same_sketch():
    for size, same in on_ranks(thinned_sketch, 2):
        assert 1 << 13 < size < 1 << 15
        assert same


def gradients_on_one_rank():
    model = shard(Branches())
    optimizer = penalised(model)
    backward(model, share(batch(0)))
    if dist.get_rank() == 1:
        model.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(w.message)[:67] for w in caught], optimizer.balance.norms.tolist()


def test_distributed_a_rank_without_gradients_is_warned_and_holds_up_none():
    (silence, norms), (warned, same_norms) = on_ranks(gradients_on_one_rank, 2)
    assert silence == []
    assert warned == ["The optimizer must hold parameters that get gradients. Got none wit"]
    assert norms == same_norms
    assert min(norms) > 0


def mixed_precision(policy, dtype):
    model = shard(Branches().to(dtype), mp_policy=policy)
    optimizer = penalised(model, max_norm=0.5)
    x, y = share(batch(0))
    backward(model, (x.to(policy.param_dtype), y.to(policy.param_dtype)))
    gradients = {name: [full(p.grad).double() for p in module.parameters()] for name, module in model.groups().items()}
    everything = torch.cat([full(p.grad).double().flatten() for p in model.parameters()])
    optimizer.step()
    clipped = torch.cat([full(p.grad).double().flatten() for p in model.parameters()])
    by_hand = [torch.cat([g.flatten() for g in group]).norm().item() for group in gradients.values()]
    return (
        optimizer.balance.norms.tolist(),
        by_hand,
        (clipped.norm() / everything.norm()).item(),
        0.5 / everything.norm(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_norms_of_mixed_precision_are_those_of_the_whole_gradients(dtype):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for norms, expected, clip, expected_clip in on_ranks(mixed_precision, 2, policy, dtype):
        assert_close(norms, expected, rtol=1e-6, atol=0)
        assert clip == pytest.approx(float(expected_clip), rel=1e-5 if dtype == torch.float32 else 1e-2)


def partial_gradients():
    """Sequence parallelism leaves each rank a part of the sum that is the gradient of a replicated parameter."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.ModuleDict({"audio": nn.LayerNorm(6), "visual": nn.Linear(6, 4)}).double()
    nn.init.normal_(model["audio"].weight)
    whole = deepcopy(model)
    parallelize_module(model, mesh, {"audio": SequenceParallel(sequence_dim=0)})
    x, _ = batch(0)
    (10 * model["audio"](share([x])[0]).full_tensor().pow(2).mean() + model["visual"](x).pow(2).mean()).backward()
    (10 * whole["audio"](x).pow(2).mean() + whole["visual"](x).pow(2).mean()).backward()
    options = {"apply_to": "gradient", "eta": 0.1, "agreement": None}
    optimizer = ConflictAwarePenalty(SGD(model.parameters(), lr=LR), dict(model.items()), **options)
    optimizer.step()
    assert any(p.is_partial() for p in model["audio"].weight.grad.placements)
    by_hand = [torch.cat([p.grad.flatten() for p in m.parameters()]).norm().item() for m in whole.values()]
    scaled = (full(model["audio"].weight.grad) / whole["audio"].weight.grad).tolist()
    return optimizer.balance.norms.tolist(), by_hand, scaled, optimizer.coefficients()["audio"]


def test_distributed_partial_gradients_are_summed_before_their_norm_is_taken():
    for norms, expected, scaled, coefficient in on_ranks(partial_gradients, 2):
        assert_close(norms, expected, rtol=1e-6, atol=0)
        assert coefficient == 0.1
        assert_close(scaled, [0.1] * 6)


def errors_by_rank(sharded, own_group):
    rank = dist.get_rank()
    model = shard(Branches()) if sharded else DistributedDataParallel(Branches())
    groups = [dist.new_group([r]) for r in range(2)]
    optimizer = penalised(model, process_group=groups[rank] if own_group else None)
    backward(model, share(batch(0)))
    optimizer.observe(text=1.0 + rank, **({"audio": 4.0} if rank == 0 else {"visual": 8.0}))
    optimizer.step()
    return optimizer.balance.errors.tolist()


@pytest.mark.parametrize("sharded", [False, True])
def test_distributed_errors_are_averaged_over_the_ranks_that_name_the_group(sharded):
    assert on_ranks(errors_by_rank, 2, sharded, False) == [[1.5, 4.0, 8.0]] * 2


@pytest.mark.parametrize("sharded", [False, True])
def test_distributed_errors_are_averaged_over_the_process_group_alone(sharded):
    first, second = on_ranks(errors_by_rank, 2, sharded, True)
    assert_close(first, [1.0, 4.0, math.nan], equal_nan=True)
    assert_close(second, [2.0, math.nan, 8.0], equal_nan=True)


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
    model = Branches()
    optimizer = penalised(model)
    names = [name for name, _ in model.named_parameters()]
    shard(model)
    parameters = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [parameters[name] for name in names]
    return train(model, optimizer)


def test_distributed_parameters_swapped_for_sharded_ones_keep_their_groups():
    expected = by_hand()
    for run in on_ranks(attached_before_sharding, 2):
        assert_close(run.coefficients, expected.coefficients, rtol=1e-6, atol=0)
        assert_close(run.parameters, expected.parameters, rtol=1e-6, atol=1e-12)


def sharded_if_ranks():
    model = Branches()
    return shard(model) if dist.get_world_size() > 1 else model


def save(folder):
    model = sharded_if_ranks()
    optimizer = penalised(model)
    train(model, optimizer, range(2))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load(folder):
    model = sharded_if_ranks()
    optimizer = penalised(model)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return train(model, optimizer, range(2, 4))


@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2)])
def test_distributed_checkpoints_resume_on_another_number_of_ranks(saving, loading, tmp_path):
    on_ranks(save, saving, str(tmp_path))
    expected = by_hand(steps=4)
    for run in on_ranks(load, loading, str(tmp_path)):
        assert_close(run.coefficients, expected.coefficients[2:], rtol=1e-6, atol=0)
        assert_close(run.parameters, expected.parameters, rtol=1e-6, atol=1e-12)


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
    penalty = attach(optimizer, model.module.groups())
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
    ("engine", "seed", "message"), [(data_parallel, None, "`generator` must be given"), (fully_sharded, 0, "`noise`")]
)
def test_distributed_noise_that_would_differ_between_ranks_is_refused(engine, seed, message):
    with pytest.raises(AssertionError, match=message):
        on_ranks(noise, 2, engine, seed)


def flattened(use_orig_params, nested, attached_first):
    wrap = partial(FullyShardedDataParallel, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    model = Branches()
    optimizer = penalised(model) if attached_first else None
    if nested:
        for name in NAMES:
            setattr(model, name, wrap(getattr(model, name)))
    wrapped = wrap(model)
    optimizer = optimizer or ConflictAwarePenalty(AdamW(wrapped.parameters()), model.groups())
    backward(wrapped, share(batch(0)))
    warnings.simplefilter("error", UserWarning)
    optimizer.step()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("use_orig_params", "attached_first", "error"),
    [
        (True, False, "RuntimeError: `groups` must hold parameters with gradients of their own"),
        (True, True, "RuntimeError: The optimizer must hold the parameters of the groups"),
        (False, False, "(RuntimeError|ValueError): `groups"),
        (False, True, "UserWarning: The optimizer must hold parameters that get gradients"),  # torch itself is silent
    ],
)
def test_distributed_parameters_flattened_by_fsdp1_are_refused(use_orig_params, nested, attached_first, error):
    with pytest.raises(AssertionError, match=f"{error}.*FSDP1"):
        on_ranks(flattened, 2, use_orig_params, nested, attached_first)


def overlapping():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(Branches())
    make = partial(ZeroRedundancyOptimizer, optimizer_class=AdamW, overlap_with_ddp=True, lr=LR)
    penalised(model, make=make)


def test_distributed_an_optimizer_that_steps_during_backward_is_refused():
    with pytest.raises(AssertionError, match="ValueError: `optimizer` must take its step in `step"):
        on_ranks(overlapping, 2)


def deepspeed_engine(stage, make, penalised_first=None):
    import deepspeed

    model = Branches().float()
    groups = {name: list(module.parameters()) for name, module in model.groups().items()}
    optimizer = make([{"params": part} for part in [*groups.values(), list(model.head.parameters())]])
    penalty = attach(SGD(model.parameters()), groups, **RULE)
    if penalised_first:
        attach(optimizer, groups)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # else stage 3 would keep such small ones whole
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


def test_distributed_deepspeed_zero_is_refused():
    pytest.importorskip("deepspeed")
    for messages in on_ranks(deepspeed_refusals, 2, timeout=400.0):
        assert len(messages) == 6
        assert all("DeepSpeed ZeRO" in message and "coefficients_for" in message for message in messages)


def deepspeed_recipe(stage, apply_to):
    from deepspeed import zero

    from examples.deepspeed_zero import coefficients, scale_gradients, scale_learning_rates

    engine, groups, penalty = deepspeed_engine(stage, partial(SGD, lr=LR) if apply_to == "gradient" else adamw)
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
    return {(stage, mode): deepspeed_recipe(stage, mode) for stage in (1, 2, 3) for mode in ("gradient", "update")}


def test_distributed_the_deepspeed_recipe_equals_training_in_one_process():
    pytest.importorskip("deepspeed")
    expected = {"gradient": by_hand(apply_to="gradient", make=SGD), "update": by_hand(apply_to="update")}
    for runs in on_ranks(deepspeed_recipes, 2, timeout=400.0):
        for (_, mode), run in runs.items():
            assert_close(run.coefficients, expected[mode].coefficients, rtol=1e-5, atol=0)  # in float32
            assert_close(run.parameters, expected[mode].parameters, rtol=1e-5, atol=1e-6)


def run_examples():
    from examples import fsdp2

    found = [fsdp2.main(steps=2)]
    if find_spec("deepspeed"):
        from examples import deepspeed_zero

        found.append(deepspeed_zero.main(steps=2, stage=3))
    return found


def test_distributed_examples_run_with_the_same_coefficients_on_all_ranks():
    first, second = on_ranks(run_examples, 2, timeout=400.0)
    assert first == second
    assert all(set(coefficients) == {"audio", "visual"} for coefficients in first)


def fail_on_one_rank():
    if dist.get_rank() == 1:
        raise ValueError("on purpose")
    dist.barrier()


def test_distributed_a_failure_on_one_rank_fails_the_test():
    with pytest.raises(AssertionError, match="Rank 1 failed"):
        on_ranks(fail_on_one_rank, 2)
