"""What `opd eval MODEL... --data FILE` does: every model on every set, a table, and JSON where it is asked for."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from opd.errors import ConfigError
from services.trainer.evaluation.estimates import gap_recovery
from services.trainer.evaluation.evaluation import PAPER_NUM_SAMPLES, PAPER_SAMPLING, EvaluatedModel, run_evaluation
from services.trainer.evaluation.results import EvaluationResult, recovery_json, recovery_line, results_tables
from services.trainer.models import LoadedModel, load_model
from services.trainer.prompts import PromptProblem, PromptView, load_problems, tokenize_problems
from services.trainer.rollout.base import SamplingParams
from services.trainer.rollout.transformers_engine import TransformersEngine


def evaluate_command(
    model_paths: Sequence[str],
    data: Sequence[str],
    *,
    sampling: SamplingParams = PAPER_SAMPLING,
    num_samples: int = PAPER_NUM_SAMPLES,
    template: str | None = None,
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
    """Evaluates each model on each set, prints a table to `console`, returns (and writes to `output`) the JSON result.

    With `before` and `teacher`, both of them among `model_paths`, every other model's gap recovery is reported.
    `dtype` `auto` is bfloat16 on CUDA and float32 elsewhere. Raises `ConfigError`, before sampling where it can.
    """
    _check_roles(model_paths, before, teacher)
    transformers_logging.disable_progress_bar()
    problems = {name: load_problems(name, template=template)[:max_problems] for name in data}
    results: dict[tuple[str, str], EvaluationResult] = {}
    for path in model_paths:
        loaded = load_model(path, device=device, dtype=_dtype(dtype, device))
        for name, rows in problems.items():
            results[path, name] = _evaluate(
                loaded,
                rows,
                name,
                PromptView(tokenizer=loaded.tokenizer, chat_template_kwargs=chat_template_kwargs or {}),
                sampling=sampling,
                num_samples=num_samples,
                max_slots=max_slots,
                cache_folder=cache_folder,
                console=console,
            )
    report = _report(results, before, teacher, console)
    if output is not None:
        _write(output, report)
    return report


def _check_roles(model_paths: Sequence[str], before: str | None, teacher: str | None) -> None:
    if not model_paths:
        raise ConfigError("no model to evaluate; give one or more folders or hub names")
    if (before is None) != (teacher is None):
        raise ConfigError("before and teacher belong together: gap recovery needs both; give both or neither")
    for role, path in (("before", before), ("teacher", teacher)):
        if path is not None and path not in model_paths:
            raise ConfigError(f"{role}: {path} is not among the evaluated models; add it to them")


def _dtype(dtype: str, device: str) -> str:
    if dtype != "auto":
        return dtype
    is_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "bfloat16" if is_cuda else "float32"


def _evaluate(
    loaded: LoadedModel,
    problems: Sequence[PromptProblem],
    data: str,
    view: PromptView,
    *,
    sampling: SamplingParams,
    num_samples: int,
    max_slots: int,
    cache_folder: Path | None,
    console: Console | None,
) -> EvaluationResult:
    engine = TransformersEngine(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        num_defined_ids=loaded.num_defined_ids,
        score_top_k=None,
        max_slots=max_slots,
    )
    # No limit of its own: a prompt that does not fit the context is reported by the evaluation.
    prompts = tokenize_problems(problems, view, max_prompt_tokens=2**31)
    model = EvaluatedModel(
        name=loaded.name,
        fingerprint=loaded.fingerprint,
        engine=engine,
        decode=lambda token_ids: loaded.tokenizer.decode(token_ids, skip_special_tokens=True),
    )
    return run_evaluation(
        model,
        prompts,
        data=Path(data).stem if Path(data).is_file() else data,
        sampling=sampling,
        num_samples=num_samples,
        cache_folder=cache_folder,
        console=console,
    )


def _report(
    results: Mapping[tuple[str, str], EvaluationResult],
    before: str | None,
    teacher: str | None,
    console: Console | None,
) -> dict[str, Any]:
    """The JSON result; the table and one line per gap recovery go to the console."""
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
        report["gap_recovery"].append({"model": result.model, "data": result.data, **recovery_json(recovery)})
        if console is not None:
            console.print(recovery_line(result.model, result.data, recovery))
    return report


def _write(output: Path, report: Mapping[str, Any]) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {output}: {error.strerror}; give a file that can be written") from error
