"""The recorded search for hyper-parameters: as many trials for the baseline as for the full model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.mosi.rows import Row, config
from examples.mosi.data import atomic

SEARCH = {"epochs": 10}
MODELS = {"baseline": "A0", "full": "A6"}


def search(
    rows: dict[str, Row],
    train: Callable[..., dict],
    path: Path,
    trials: int,
    common: dict[str, Any],
) -> None:
    """Writes to `path` every trial and, of each model, the settings with the best validation MAE (seed 0).

    The first trial of each model is that of the settings before any tuning; test metrics are not looked at.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record: dict[str, Any] = {"schedule": SEARCH, "best": {}, "trials": {}}
    for model, row in MODELS.items():

        def objective(trial: optuna.Trial, row: Row = rows[row]) -> float:
            own = config(row, {row.tuned: suggest(trial)}, **common | SEARCH)
            value = min(line["valid"]["mae"] for line in train(own)["history"])
            print(f"{row.title}: validation MAE {value:.3f} with {trial.params}", flush=True)
            return value

        tries = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=trials)
        )
        tries.enqueue_trial(
            {
                "lr": 2e-3,
                "dropout": 0.3,
                "beta": 1.0,
                "uni": 0.1,
                "recon": 0.1,
                "div": 0.01,
                "stat": 0.1,
            }
        )
        tries.optimize(objective, trials)
        record["best"][model] = tries.best_params
        record["trials"][model] = [{"valid_mae": t.value} | t.params for t in tries.trials]
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def suggest(trial) -> dict[str, float]:
    return {
        "lr": trial.suggest_float("lr", 1e-3, 4e-3, log=True),
        "dropout": trial.suggest_float("dropout", 0.1, 0.5),
        "beta": trial.suggest_float("beta", 0.1, 1.0, log=True),
        "uni": trial.suggest_float("uni", 0.03, 0.3, log=True),
        "recon": trial.suggest_float("recon", 0.01, 0.3, log=True),
        "div": trial.suggest_float("div", 0.001, 0.1, log=True),
        "stat": trial.suggest_float("stat", 0.01, 0.3, log=True),
    }
