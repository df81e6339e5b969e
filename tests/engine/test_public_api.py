"""The public surface: names, signatures, documentation, types, what is imported and packed."""

import ast
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import gradbalance
from gradbalance import rules
from gradbalance._step.options import Options
from tests import needs

ROOT = Path(__file__).parents[2]

USER_SCRIPT = """
from typing import assert_type

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from gradbalance import (
    PAPER,
    Balance,
    ConflictAwarePenalty,
    Moments,
    Recorder,
    StatisticalLoss,
    attach,
    groups_by_name,
    moments,
    rules,
    statistical_loss,
)


def half(measured: rules.Measured) -> list[float]:
    return [0.5] * len(measured.names)


model = nn.ModuleDict({"text": nn.Linear(4, 1), "audio": nn.Linear(4, 1)})
groups = groups_by_name(model, text="text", audio=["audio.weight", "audio.b*"])
assert_type(groups["text"], list[nn.Parameter])
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = ConflictAwarePenalty(sgd, groups, half, late=True, window=(0, None), max_norm=1.0)
rule: rules.Rule = rules.ConflictAware(alpha=0.5)
rule = rules.ByHand(text=0.1)
rule = lambda m: m.shares.min() / m.shares
rule = rules.Watch(half)
as_optimizer: torch.optim.Optimizer = optimizer
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
optimizer.observe(text=0.5, audio=torch.tensor(0.5))
optimizer.observe(text=0.5, audio=0.5)
optimizer.step()
assert_type(optimizer.coefficients_for({"text": 1.0, "audio": torch.tensor(2.0)}), dict[str, float])
assert_type(optimizer.coefficients(), dict[str, float])
assert_type(optimizer.balance, Balance)
assert_type(optimizer.balance.norms, NDArray[np.float64])
assert_type(optimizer.balance.names, tuple[str, ...])
optimizer.remove()
handle = attach(sgd, {"text": model["text"], "audio": model["audio"].parameters()}, **PAPER)
with Recorder(handle, every=2) as recorder:
    sgd.step()
assert_type(recorder.to_dict(), dict[str, np.ndarray])
assert_type(recorder.summary().warnings, list[str])
assert_type(recorder.summary().rows["text"].coherence, float)
assert_type(recorder.multipliers()["text"], tuple[float, float])
assert_type(recorder.plot("figure.png"), Figure)
x = torch.randn(5, 3)
assert_type(statistical_loss(x, x, moments=("mean", "skewness")), Tensor)
assert_type(moments(x, order=4), Moments)
module: nn.Module = StatisticalLoss(normalise=True)
"""


def run(code, *args):
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_the_public_names_are_these_and_no_others():
    assert sorted(gradbalance.__all__) == sorted(
        [
            "ConflictAwarePenalty",
            "attach",
            "Balance",
            "Recorder",
            "groups_by_name",
            "StatisticalLoss",
            "statistical_loss",
            "moments",
            "Moments",
            "PAPER",
            "Penalty",
            "rules",
        ]
    )
    public = set()
    for name, value in vars(gradbalance).items():
        if not name.startswith("_") and (name == "rules" or not inspect.ismodule(value)):
            public.add(name)
    assert public == set(gradbalance.__all__)
    for module in (gradbalance.balance, gradbalance.groups, gradbalance.penalty):
        assert set(module.__all__) <= public
    in_rules = ["ByHand", "ConflictAware", "Measured", "Rule", "Useful", "Watch"]
    of_others = ["OGM", "ClipGroups", "Epochwise"]
    assert set(gradbalance.rules.__all__) == {*in_rules, *of_others}


@pytest.mark.parametrize(
    "name", [name for name in gradbalance.__all__ if callable(getattr(gradbalance, name))]
)
def test_every_public_name_is_documented_with_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(gradbalance, name))


@pytest.mark.parametrize(
    "name", [name for name in rules.__all__ if name not in ("Rule", "Measured")]
)
def test_every_rule_is_documented_with_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(rules, name))


@pytest.mark.parametrize("name", ["ConflictAwarePenalty", "Penalty", "Recorder", "StatisticalLoss"])
def test_every_public_method_is_documented(name):
    own = vars(getattr(gradbalance, name))
    methods = [
        key for key, value in own.items() if inspect.isfunction(value) and not key.startswith("_")
    ]
    assert [key for key in methods if not inspect.getdoc(own[key])] == []


@pytest.mark.parametrize(
    "name", ["observe", "coefficients", "coefficients_for", "remove", "balance"]
)
def test_the_wrapper_and_the_handle_offer_the_same(name):
    of_both = [vars(cls)[name] for cls in (gradbalance.ConflictAwarePenalty, gradbalance.Penalty)]
    assert type(of_both[0]) is type(of_both[1])
    signatures = []
    for each in of_both:
        assert len(inspect.getdoc(each)) > 40
        signatures.append(inspect.signature(each.fget if isinstance(each, property) else each))
    assert signatures[0] == signatures[1]


def test_both_ways_to_put_the_penalty_on_and_the_options_agree():
    def parameters_of(function):
        parameters = inspect.signature(function).parameters.values()
        return [p for p in parameters if p.name != "self"]

    def shown(p):
        return p.name, p.kind, p.default, p.annotation

    wrapped = parameters_of(gradbalance.ConflictAwarePenalty.__init__)
    attached = parameters_of(gradbalance.attach)
    assert [shown(p) for p in wrapped] == [shown(p) for p in attached]
    assert [p.name for p in wrapped[:3]] == ["optimizer", "groups", "rule"]
    assert all(p.kind is p.KEYWORD_ONLY for p in wrapped[3:])
    options = [(field.name, field.default, field.type) for field in dataclasses.fields(Options)]
    assert options == [(p.name, p.default, p.annotation) for p in wrapped[2:]]


def test_an_option_that_is_given_arrives():
    values = {
        "rule": rules.ByHand(text=0.5),
        "apply_to": "displacement",
        "smoothing": 0.5,
        "every": 3,
        "window": (1, 4),
        "late": True,
        "noise": {"text": 0.25},
        "max_norm": 2.0,
        "persist": False,
    }
    for put_on in (gradbalance.ConflictAwarePenalty, gradbalance.attach):
        model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in ("text", "audio")})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        penalty = put_on(optimizer, dict(model), **values, generator=torch.Generator())
        for name, value in values.items():
            if name != "apply_to":
                assert f"{name}={value!r}" in repr(penalty)
        assert "on the update by displacement" in repr(penalty)
        assert "generator=<torch._C.Generator" in repr(penalty)


@pytest.mark.parametrize(
    "name", [name for name in gradbalance.__all__ if callable(getattr(gradbalance, name))]
)
def test_the_module_of_a_public_name_is_a_public_path(name):
    public = getattr(gradbalance, name)
    path = public.__module__
    assert not any(part.startswith("_") for part in path.split("."))
    assert getattr(importlib.import_module(path), name) is public


def test_the_docstring_lists_every_option():
    documented = inspect.getdoc(gradbalance.ConflictAwarePenalty)
    for name in inspect.signature(gradbalance.ConflictAwarePenalty).parameters:
        assert f"\n    {name}: " in documented


def executed(node):
    """The node and all below it, but what only a type checker reads."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from executed(child)


def test_collectives_stay_in_the_rooms_that_sum_over_ranks():
    """import-linter knows no parts of other packages."""
    found = set()
    for path in (ROOT / "gradbalance").rglob("*.py"):
        if path.is_relative_to(
            ROOT / "gradbalance" / "statistics"
        ):  # which the engine does not know
            continue
        for node in executed(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            if any(name.startswith("torch.distributed") for name in names):
                found.add(path.relative_to(ROOT / "gradbalance").as_posix())
    assert found == {"_step/gradients.py", "_step/measure.py"}


def test_a_user_s_typed_script_passes_mypy_strict(tmp_path):
    needs("mypy")
    script = tmp_path / "script.py"
    script.write_text(USER_SCRIPT)
    # The cache of the project: to check torch anew takes half a minute.
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", *cache, str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_loads_nothing_but_torch_and_numpy():
    loaded = json.loads(
        run(
            "import json, sys, numpy, torch; before = set(sys.modules); import gradbalance; "
            "print(json.dumps(sorted(set(sys.modules) - before)))"
        )
    )
    packages = {name.partition(".")[0] for name in loaded}
    assert packages - set(sys.stdlib_module_names) <= {"gradbalance", "numpy"}
    assert "gradbalance._figure" not in loaded  # it needs matplotlib


def test_the_wheel_holds_the_package_alone(tmp_path):
    needs("build")
    needs("hatchling")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    files = [path for path in (ROOT / "gradbalance").rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".pyc" and ".mypy_cache" not in path.parts]
    modules = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in names if ".dist-info/" not in name} == modules
    assert "gradbalance/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
