"""Grades the student while it is being trained, on problem files that are checked before the first step.

The engine samples from the student's own module, so nothing is loaded twice. Results are not cached: the weights they
belong to change with the next step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from opd.errors import ConfigError
from services.trainer.config import TrainSettings
from services.trainer.evaluation.evaluation import run_evaluation
from services.trainer.evaluation.sampling import EvaluatedModel
from services.trainer.models import LoadedModel
from services.trainer.prompts import PromptView, TokenizedPrompt, load_problems, tokenize_problems
from services.trainer.rollout.base import RolloutEngine, SamplingParams
from services.trainer.run_log import RunLog


class Evaluator:
    """Evaluates the student as it is on every file of `evaluation.files`."""

    def __init__(
        self,
        settings: TrainSettings,
        loaded: LoadedModel,
        *,
        engine: RolloutEngine,
        decode: Callable[[Sequence[int]], str],
        log: RunLog,
    ) -> None:
        """`ConfigError` for files of one name and problems that cannot be graded or asked: better now than later."""
        self._settings = settings
        self._log = log
        self._model = EvaluatedModel(name=loaded.name, fingerprint="", engine=engine, decode=decode)
        view = PromptView(tokenizer=loaded.tokenizer, chat_template_kwargs=settings.data.chat_template_kwargs)
        _check_names(settings.evaluation.files)
        self._sets = {Path(file).stem: self._prompts(file, view) for file in settings.evaluation.files}

    def evaluate(self, step: int) -> dict[str, float]:
        """avg@n of each file, as `accuracy/FILE`; the whole result goes to the run folder."""
        evaluation = self._settings.evaluation
        sampling = SamplingParams(
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            max_response_tokens=evaluation.max_response_tokens,
            seed=self._settings.seed,
        )
        model = dataclasses.replace(self._model, fingerprint=f"step-{step}")
        accuracies: dict[str, float] = {}
        for name, prompts in self._sets.items():
            result = run_evaluation(model, prompts, data=name, sampling=sampling, num_samples=evaluation.num_samples)
            self._log.write_evaluation(f"step-{step:06d}-{name}", result.as_json())
            accuracies[f"accuracy/{name}"] = result.total.accuracy.value
        return accuracies

    def _prompts(self, file: str, view: PromptView) -> list[TokenizedPrompt]:
        problems = load_problems(file, template=self._settings.evaluation.template)
        for problem in problems:
            if problem.answer is None or not problem.template:
                missing = "answer" if problem.answer is None else "known template"
                raise ConfigError(
                    f"evaluation.files: row {problem.index} of {file} has no {missing}, so it cannot be graded; "
                    "correct the row or set evaluation.template"
                )
        prompts = tokenize_problems(problems, view, max_prompt_tokens=2**31)
        _check_lengths(prompts, file, self._model.engine.max_context)
        return prompts


def _check_lengths(prompts: Sequence[TokenizedPrompt], file: str, max_context: int) -> None:
    longest = max(prompts, key=lambda prompt: prompt.prompt_token_ids.size)
    num_tokens = longest.prompt_token_ids.size
    if num_tokens >= max_context:
        raise ConfigError(
            f"evaluation.files: row {longest.problem.index} of {file} has {num_tokens} prompt tokens, "
            f"the student's context is {max_context}; leave the row out"
        )


def _check_names(files: Sequence[str]) -> None:
    names = [Path(file).stem for file in files]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"evaluation.files: {repeated[0]} is the name of several, so their metrics would be one; rename a file"
        )
