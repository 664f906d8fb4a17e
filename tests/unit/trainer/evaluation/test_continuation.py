"""Teacher continuation with engines whose chances are known, against counting by hand."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opd.errors import ConfigError
from opd.types import FinishReason, Rollout
from services.trainer.evaluation.continuation import (
    ContinuationResult,
    continuation_lines,
    continuation_table,
    run_continuation,
)
from services.trainer.evaluation.figures import draw_continuation
from services.trainer.evaluation.sampling import EvaluatedModel
from services.trainer.prompts import PromptProblem, TokenizedPrompt
from services.trainer.rollout.base import RolloutRequest, SamplingParams

WORDS = ["<end>", "\\boxed{1}", "\\boxed{2}", "well"]
END, RIGHT, WRONG, WELL = range(4)
SAMPLING = SamplingParams(max_response_tokens=12)
NUM_PROMPTS, NUM_SAMPLES = 12, 4


def decode(token_ids: Sequence[int]) -> str:
    return " ".join(WORDS[token_id] for token_id in token_ids)


class WordyEngine:
    """Says "well" a few times, then an answer that is right by a chance; both by the request's seed alone."""

    policy_version = 0
    max_context = 40

    def __init__(self, chance: Callable[[int], float]) -> None:
        self.chance = chance
        """By the number of tokens it is given."""
        self.calls: list[tuple[Sequence[RolloutRequest], SamplingParams]] = []
        self.dies_after: int | None = None

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        *,
        on_finish: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        self.calls.append((requests, sampling))
        rollouts = []
        for request in requests:
            if self.dies_after is not None and len(rollouts) == self.dies_after:
                raise KeyboardInterrupt
            rollouts.append(self._rollout(request, sampling))
            if on_finish is not None:
                on_finish(rollouts[-1])
        return rollouts

    def _rollout(self, request: RolloutRequest, sampling: SamplingParams) -> Rollout:
        generator = np.random.default_rng(request.seed)
        is_right = generator.uniform() < self.chance(request.prompt_token_ids.size)
        words = [WELL] * int(generator.integers(1, 8)) + [RIGHT if is_right else WRONG, END]
        token_ids = np.array(words[: sampling.max_response_tokens], np.int32)
        nothing = np.full(token_ids.size, np.nan, np.float32)
        return Rollout(
            rollout_id=request.rollout_id,
            group=request.group,
            prompt_token_ids=request.prompt_token_ids,
            response_token_ids=token_ids,
            finish_reason=FinishReason.STOP if token_ids[-1] == END else FinishReason.LENGTH,
            rollout_logprobs=nothing,
            topk_token_ids=np.zeros((token_ids.size, 0), np.int32),
            topk_logprobs=np.zeros((token_ids.size, 0), np.float32),
            sampled_logprobs=nothing,
            entropy=nothing,
            policy_version=0,
        )


def prompt(index: int) -> TokenizedPrompt:
    ids = np.array([WELL] * 3 + [index % 4], np.int32)
    problem = PromptProblem(
        index=index, messages=({"role": "user", "content": "Q"},), question="Q", template="boxed", answer="1",
        source="sums", level="",
    )  # fmt: skip
    return TokenizedPrompt(problem=problem, prompt_token_ids=ids, teacher_prompt_token_ids=ids, template="boxed")


PROMPTS = [prompt(index) for index in range(NUM_PROMPTS)]


def run(
    student: WordyEngine | None = None, teacher: WordyEngine | None = None, depths: Sequence[int] = (4, 1), **more: Any
) -> ContinuationResult:
    engines = (student or WordyEngine(lambda size: 0.3), teacher or WordyEngine(lambda size: 0.95 - 0.1 * (size - 4)))
    asked = [
        EvaluatedModel(name=name, fingerprint=name, engine=engine, decode=decode)
        for name, engine in zip(("student", "teacher"), engines, strict=True)
    ]
    settings: dict[str, Any] = {"data": "sums", "sampling": SAMPLING, "num_samples": NUM_SAMPLES}
    return run_continuation(*asked, PROMPTS, depths=depths, **(settings | more))


def test_gains_equal_counting_by_hand(tmp_path: Path) -> None:
    teacher = WordyEngine(lambda size: 0.8)
    found = run(teacher=teacher, num_continuations=3, cache_folder=tmp_path)
    kept = [
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in tmp_path.glob("*.jsonl")
    ]
    by_model = {name: [lines for lines in kept if lines[0]["identity"]["responses"]["model"] == name] for name in
                ("student", "teacher")}  # fmt: skip
    (own,) = by_model["student"]
    long = sorted(
        (one for one in own[1:] if len(one["token_ids"]) > 4), key=lambda one: (one["problem"], one["sample"])
    )
    assert 0 < len(long) < NUM_PROMPTS * NUM_SAMPLES
    assert (found.num_rollouts, found.num_selected) == (NUM_PROMPTS * NUM_SAMPLES, len(long))
    assert found.num_selected_problems == len({one["problem"] for one in long})
    own_right = np.array(["\\boxed{1}" in one["text"] for one in long])
    assert found.student_accuracy.value == pytest.approx(own_right.mean())
    assert [one.depth for one in found.depths] == [1, 4]
    for one in found.depths:
        (lines,) = [
            lines for lines in by_model["teacher"]
            if lines[0]["identity"]["responses"]["max_response_tokens"] == 12 - one.depth
        ]  # fmt: skip
        right = np.zeros((len(long), 3))
        for line in lines[1:]:
            right[line["problem"], line["sample"]] = "\\boxed{1}" in line["text"]
        assert one.accuracy.value == pytest.approx(right.mean())
        assert one.gain.value == pytest.approx(right.mean() - own_right.mean())
        assert one.gain.low <= one.gain.value <= one.gain.high
    assert found.decline is not None
    assert found.decline.value == pytest.approx(found.depths[0].gain.value - found.depths[1].gain.value)


def test_the_teacher_sees_the_prompt_and_the_students_own_tokens() -> None:
    student, teacher = WordyEngine(lambda size: 0.3), WordyEngine(lambda size: 0.9)
    run(student, teacher, depths=(0, 2))
    ((asked, _),) = student.calls
    (alone, first), (continued, second) = teacher.calls
    assert (first.max_response_tokens, second.max_response_tokens) == (12, 10)
    assert first.seed != second.seed != SAMPLING.seed
    assert len(alone) == len(continued)
    for request in alone:
        assert request.prompt_token_ids.tolist() in [one.prompt_token_ids.tolist() for one in PROMPTS]
    for request in continued:
        assert request.prompt_token_ids.size == 4 + 2
        assert request.prompt_token_ids[4] == WELL
    assert len(asked) == NUM_PROMPTS * NUM_SAMPLES


def test_an_answer_in_the_prefix_counts() -> None:
    """The student answers at once and goes on talking; whatever the teacher adds, the last box is the student's."""

    class Early(WordyEngine):
        def _rollout(self, request: RolloutRequest, sampling: SamplingParams) -> Rollout:
            rollout = super()._rollout(request, sampling)
            rollout.response_token_ids[:] = [RIGHT] + [WELL] * (rollout.response_token_ids.size - 2) + [END]
            return rollout

    class Silent(WordyEngine):
        def _rollout(self, request: RolloutRequest, sampling: SamplingParams) -> Rollout:
            rollout = super()._rollout(request, sampling)
            rollout.response_token_ids[:-1] = WELL
            return rollout

    found = run(Early(lambda size: 1.0), Silent(lambda size: 0.0), depths=(0, 2))
    assert found.student_accuracy.value == 1
    assert [one.accuracy.value for one in found.depths] == [0, 1]


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path) -> None:
    expected = run()
    dying = WordyEngine(lambda size: 0.95 - 0.1 * (size - 4))
    dying.dies_after = 5
    with pytest.raises(KeyboardInterrupt):
        run(teacher=dying, cache_folder=tmp_path)
    student, teacher = WordyEngine(lambda size: 0.3), WordyEngine(lambda size: 0.95 - 0.1 * (size - 4))
    assert run(student, teacher, cache_folder=tmp_path) == expected
    assert sum(len(requests) for requests, _ in student.calls) == 0
    assert len(teacher.calls[0][0]) == expected.num_selected - 5


def test_a_falling_gain_is_seen_and_drawn(tmp_path: Path) -> None:
    falling = run(teacher=WordyEngine(lambda size: 1.0 if size < 6 else 0.1), num_samples=12)
    assert falling.decline is not None and falling.decline.low > 0
    assert "holds here" in continuation_lines(falling)[1]
    rising = run(teacher=WordyEngine(lambda size: 0.0 if size < 6 else 1.0), num_samples=12)
    assert "does not hold here: it rises" in continuation_lines(rising)[1]
    same = run(teacher=WordyEngine(lambda size: 0.5))
    assert "cannot be told" in continuation_lines(same)[1]
    assert len(continuation_lines(run(depths=(2,)))) == 1
    console = Console(file=io.StringIO(), width=80)
    console.print(continuation_table(falling))
    assert isinstance(console.file, io.StringIO)
    assert max(len(line) for line in console.file.getvalue().splitlines()) <= 80
    draw_continuation(falling, tmp_path / "new" / "figure.png")
    drawn = (tmp_path / "new" / "figure.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    draw_continuation(rising, tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "depths: none; give token counts"),
        ({"depths": (-1, 2)}, "depths: -1, 2; give token counts from 0"),
        ({"depths": (12,)}, r"depths: 12; give .* below the longest response \(12 tokens\)"),
        ({"depths": (11,)}, r"no rollout is longer than 11 tokens \(the longest has 9\)"),
        ({"num_continuations": 0}, "num_continuations: 0 is too small"),
        ({"num_samples": 0}, "num_samples: 0 is too small"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes)
