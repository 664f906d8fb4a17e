"""What `opd eval MODEL... --data FILE` does: every model on every set, a table, and JSON where it is asked for."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from opd.errors import ConfigError
from services.trainer.evaluation.estimates import gap_recovery
from services.trainer.evaluation.evaluation import run_evaluation
from services.trainer.evaluation.opening import Loading, labels, open_model, open_problems
from services.trainer.evaluation.results import EvaluationResult, as_plain_json, recovery_line, results_tables
from services.trainer.evaluation.sampling import PAPER_NUM_SAMPLES, PAPER_SAMPLING
from services.trainer.memory import FOR_COMMAND, memory_errors
from services.trainer.prompts import PromptProblem
from services.trainer.rollout.base import SamplingParams

Results = Mapping[tuple[str, str], EvaluationResult]


@memory_errors(FOR_COMMAND)
def evaluate_command(
    model_paths: Sequence[str],
    data: Sequence[str],
    *,
    sampling: SamplingParams = PAPER_SAMPLING,
    num_samples: int = PAPER_NUM_SAMPLES,
    template: str | None = None,
    split: str = "train",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_problems: int | None = None,
    before: str | None = None,
    teacher: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_slots: int = 256,
    cache_folder: Path | None = None,
    output: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates each model on each set, prints tables to `console`, returns (and writes to `output`) the JSON result.

    With `before` and `teacher`, which are evaluated too, every other model's gap recovery is reported. Raises
    `ConfigError`, before sampling where it can.
    """
    paths = _all_models(model_paths, before, teacher)
    sets = open_problems(data, template=template, split=split, max_problems=max_problems)
    loading = Loading(
        device=device, dtype=dtype, max_slots=max_slots, chat_template_kwargs=chat_template_kwargs or {}
    )  # fmt: skip
    results: dict[tuple[str, str], EvaluationResult] = {}
    for (key, path), label in zip(paths.items(), labels(list(paths.values())), strict=True):
        found = _evaluate(path, label, sets, loading, sampling, num_samples, cache_folder, console)
        results |= {(key, name): result for name, result in found.items()}
    report = _report(results, before and os.path.normpath(before), teacher and os.path.normpath(teacher), console)
    if output is not None:
        write_json(output, report)
    return report


def _all_models(model_paths: Sequence[str], before: str | None, teacher: str | None) -> dict[str, str]:
    """Every model once, by normal form; where they are not among those named, `before` first and the teacher last."""
    if not model_paths:
        raise ConfigError("no model to evaluate; give one or more folders or hub names")
    if (before is None) != (teacher is None):
        raise ConfigError("before and teacher belong together: gap recovery needs both; give both or neither")
    named = {os.path.normpath(path): path for path in model_paths}
    first = {} if before is None else {os.path.normpath(before): before}
    last = {} if teacher is None else {os.path.normpath(teacher): teacher}
    return named if first.keys() | last.keys() <= named.keys() else first | named | last


def _evaluate(
    path: str,
    label: str,
    sets: Mapping[str, Sequence[PromptProblem]],
    loading: Loading,
    sampling: SamplingParams,
    num_samples: int,
    cache_folder: Path | None,
    console: Console | None,
) -> dict[str, EvaluationResult]:
    """One model on every set; it is given up again before the next is loaded."""
    opened = open_model(path, loading, label=label)
    return {
        name: run_evaluation(
            opened.evaluated,
            opened.tokenize(problems),
            data=name,
            sampling=sampling,
            num_samples=num_samples,
            cache_folder=cache_folder,
            console=console,
        )
        for name, problems in sets.items()
    }


def _report(results: Results, before: str | None, teacher: str | None, console: Console | None) -> dict[str, Any]:
    """The JSON result; the tables and one line per gap recovery go to the console."""
    if console is not None:
        for table in results_tables(list(results.values())):
            console.print(table)
    report: dict[str, Any] = {"results": [result.as_json() for result in results.values()]}
    if before is None or teacher is None:
        return report
    report["gap_recovery"] = []
    for (path, data), result in results.items():
        if path in (before, teacher):
            continue
        columns = (results[before, data], result, results[teacher, data])
        recovery = gap_recovery(*(np.array(column.accuracy_by_problem) for column in columns))
        report["gap_recovery"].append({"model": result.model, "data": result.data, **as_plain_json(recovery)})
        if console is not None:
            console.print(recovery_line(result.model, result.data, recovery))
    return report


def write_json(output: Path, report: Mapping[str, Any]) -> None:
    """Writes a report, its folder included; `ConfigError` where that cannot be."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {output}: {error.strerror}; give a file that can be written") from error
