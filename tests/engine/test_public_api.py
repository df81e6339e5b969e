import ast
import inspect
import json
import pydoc
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gradbalance
from gradbalance import rules
from tests import needs

ROOT = Path(__file__).parents[2]

USER_SCRIPT = """
from typing import assert_type

import numpy as np
import torch
from matplotlib.figure import Figure
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


def half(measured: rules.Measured) -> Tensor:
    return torch.full_like(measured.norms, 0.5)


model = nn.ModuleDict({"text": nn.Linear(4, 1), "audio": nn.Linear(4, 1)})
groups = groups_by_name(model, text="text", audio=["audio.weight", "audio.b*"])
assert_type(groups["text"], list[nn.Parameter])
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = ConflictAwarePenalty(sgd, groups, half, apply_to="gradient", window=(0, None), max_norm=1.0)
rule: rules.Rule = rules.ConflictAware(alpha=0.5)
rule = rules.ByHand(text=0.1)
rule = lambda m: m.shares.amin() / m.shares
as_optimizer: torch.optim.Optimizer = optimizer
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
optimizer.observe(text=0.5, audio=torch.tensor(0.5))
optimizer.observe(text=0.5, audio=0.5)
optimizer.step()
assert_type(optimizer.coefficients_for({"text": 1.0, "audio": torch.tensor(2.0)}), dict[str, float])
assert_type(optimizer.coefficients(), dict[str, float])
assert_type(optimizer.balance, Balance)
assert_type(optimizer.balance.norms, Tensor)
assert_type(optimizer.balance.names, tuple[str, ...])
optimizer.remove()
handle = attach(sgd, {"text": model["text"], "audio": model["audio"].parameters()}, **PAPER)
with Recorder(handle, every=2) as recorder:
    sgd.step()
assert_type(recorder.to_dict(), dict[str, np.ndarray])
assert_type(recorder.summary().norms, dict[str, float])
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
    public = {name for name in vars(gradbalance) if not name.startswith("_")}
    assert public == set(gradbalance.__all__)
    in_rules = ["ByHand", "Coherence", "ConflictAware", "Measured", "Rule", "Watch"]
    assert sorted(gradbalance.rules.__all__) == in_rules


@pytest.mark.parametrize("name", [name for name in gradbalance.__all__ if callable(getattr(gradbalance, name))])
def test_every_public_name_is_documented_with_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(gradbalance, name))


@pytest.mark.parametrize("name", [name for name in rules.__all__ if name not in ("Rule", "Measured")])
def test_every_rule_is_documented_with_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(rules, name))


@pytest.mark.parametrize("name", ["ConflictAwarePenalty", "Penalty", "Recorder", "StatisticalLoss"])
def test_every_public_method_is_documented(name):
    own = vars(getattr(gradbalance, name))
    methods = [key for key, value in own.items() if inspect.isfunction(value) and not key.startswith("_")]
    assert [key for key in methods if not inspect.getdoc(own[key])] == []


@pytest.mark.parametrize("name", ["observe", "coefficients", "coefficients_for", "remove"])
def test_the_help_of_the_optimizer_is_the_whole_text(name):
    shown = pydoc.plain(pydoc.render_doc(getattr(gradbalance.ConflictAwarePenalty, name)))
    text = inspect.getdoc(getattr(gradbalance.Penalty, name))
    assert len(text) > 40
    assert inspect.cleandoc(text).splitlines()[-1].strip() in shown
    assert f"{name}(self" in shown


def test_both_ways_to_put_the_penalty_on_show_the_same_options():
    wrapped, attached = map(inspect.signature, (gradbalance.ConflictAwarePenalty, gradbalance.attach))
    options = [name for name, p in wrapped.parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert options == [
        *("apply_to", "smoothing", "every", "window", "noise", "max_norm", "generator", "process_group", "persist")
    ]
    assert list(attached.parameters)[:3] == ["optimizer", "groups", "rule"]
    defaults = [{k: p.default for k, p in s.parameters.items()} for s in (wrapped, attached)]
    assert defaults[0] == defaults[1]


def test_the_docstring_lists_every_option():
    documented = inspect.getdoc(gradbalance.ConflictAwarePenalty)
    for name in inspect.signature(gradbalance.ConflictAwarePenalty).parameters:
        assert f"\n    {name}: " in documented


def test_collectives_stay_in_the_rooms_that_sum_over_ranks():
    """import-linter knows no parts of other packages."""
    found = set()
    for path in (ROOT / "gradbalance").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            if any(name.startswith("torch.distributed") for name in names):
                found.add(path.relative_to(ROOT / "gradbalance").parts[0])
    assert found == {"_gradients", "_moments"}


def test_a_user_s_typed_script_passes_mypy_strict(tmp_path):
    needs("mypy")
    script = tmp_path / "script.py"
    script.write_text(USER_SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path), str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_loads_nothing_that_torch_has_not_loaded():
    loaded = json.loads(
        run(
            "import json, sys, torch; before = set(sys.modules); import gradbalance; "
            "print(json.dumps(sorted(set(sys.modules) - before)))"
        )
    )
    packages = {name.partition(".")[0] for name in loaded}
    assert packages - set(sys.stdlib_module_names) == {"gradbalance"}
    assert "gradbalance._record.figure" not in loaded  # it needs matplotlib


def test_the_wheel_holds_the_package_alone(tmp_path):
    needs("build")
    needs("hatchling")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    files = [path for path in (ROOT / "gradbalance").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    modules = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in names if ".dist-info/" not in name} == modules
    assert "gradbalance/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
