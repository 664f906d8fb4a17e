"""Whole evaluations: a model of known chances, real loaded folders, interruption and repetition."""

import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.errors import ConfigError
from opd.types import FinishReason, Rollout
from services.trainer.evaluation.command import evaluate_command
from services.trainer.evaluation.evaluation import run_evaluation
from services.trainer.evaluation.results import EvaluationResult
from services.trainer.evaluation.sampling import PAPER_NUM_SAMPLES, PAPER_SAMPLING, EvaluatedModel
from services.trainer.prompts import PromptProblem, TokenizedPrompt
from services.trainer.rollout.base import RolloutRequest, SamplingParams
from services.trainer.templates import TEMPLATES

WORDS = ["<end>", "\\boxed{1}", "\\boxed{2}", "\\boxed{3}", "well", "Answer:"]
END, WELL = 0, 4
SAMPLING = SamplingParams(max_response_tokens=3)


def decode(token_ids: Sequence[int]) -> str:
    return " ".join(WORDS[token_id] for token_id in token_ids)


class ChanceEngine:
    """Answers 1, 2 or 3 with chances set by the prompt's first id, each by the seed of its request alone."""

    policy_version = 0
    max_context = 100

    def __init__(self) -> None:
        self.asked: list[RolloutRequest] = []
        self.sampling: SamplingParams | None = None
        self.dies_after: int | None = None

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        *,
        on_finish: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        self.sampling = sampling
        rollouts = []
        for request in requests:
            if self.dies_after is not None and len(rollouts) == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            rollouts.append(self._rollout(request))
            if on_finish is not None:
                on_finish(rollouts[-1])
        return rollouts

    def _rollout(self, request: RolloutRequest) -> Rollout:
        chance = float(request.prompt_token_ids[0]) / 10
        draw = np.random.default_rng(request.seed).uniform()
        is_cut_off = draw > 0.95
        answer = [WELL, WELL, WELL] if is_cut_off else [WELL, 1 if draw < chance else 2, END]
        nothing = np.full(3, np.nan, np.float32)
        return Rollout(
            rollout_id=request.rollout_id,
            group=request.group,
            prompt_token_ids=request.prompt_token_ids,
            response_token_ids=np.array(answer, np.int32),
            finish_reason=FinishReason.LENGTH if is_cut_off else FinishReason.STOP,
            rollout_logprobs=nothing,
            topk_token_ids=np.zeros((3, 0), np.int32),
            topk_logprobs=np.zeros((3, 0), np.float32),
            sampled_logprobs=nothing,
            entropy=nothing,
            policy_version=0,
        )


def prompt(
    index: int, tenths: int, *, source: str = "sums", level: str = "", answer: str | None = "1"
) -> TokenizedPrompt:
    ids = np.array([tenths, 0], np.int32)
    problem = PromptProblem(
        index=index,
        messages=({"role": "user", "content": "Q"},),
        question="Q",
        template="boxed",
        answer=answer,
        source=source,
        level=level,
    )
    return TokenizedPrompt(problem=problem, prompt_token_ids=ids, teacher_prompt_token_ids=ids, template="boxed")


PROMPTS = [
    prompt(0, 0, level="hard"),
    prompt(1, 5, level="easy"),
    prompt(2, 9, level="easy"),
    prompt(3, 10, source="others", answer="1.0"),
]


def evaluated(engine: Any = None, fingerprint: str = "f1") -> EvaluatedModel:
    return EvaluatedModel(name="tiny", fingerprint=fingerprint, engine=engine or ChanceEngine(), decode=decode)


def run(engine: Any = None, *, prompts: Sequence[TokenizedPrompt] = PROMPTS, **changes: Any) -> EvaluationResult:
    settings: dict[str, Any] = {"data": "sums", "sampling": SAMPLING, "num_samples": 8}
    return run_evaluation(evaluated(engine), prompts, **(settings | changes))


def test_the_papers_sampling_is_the_default() -> None:
    assert (PAPER_NUM_SAMPLES, PAPER_SAMPLING.temperature, PAPER_SAMPLING.top_p) == (16, 0.7, 0.95)
    assert PAPER_SAMPLING.max_response_tokens == 31_744


def test_the_summary_equals_counting_by_hand(tmp_path: Path) -> None:
    found = run(cache_folder=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert "identity" in lines[0] and len(lines) == 1 + 32
    table = np.zeros((4, 8))
    for line in lines[1:]:
        table[line["problem"], line["sample"]] = "\\boxed{1}" in line["text"]
        assert line["is_truncated"] == (line["text"] == "well well well")
        assert line["token_ids"][:1] == [WELL] and len(line["token_ids"]) == 3
    total = found.total
    assert total.accuracy.value == pytest.approx(table.mean())
    assert total.accuracy.low <= table.mean() <= total.accuracy.high
    assert found.accuracy_by_problem == pytest.approx(tuple(table.mean(axis=1)))
    assert total.solve_all.value == np.mean(table.sum(axis=1) == 8)
    assert total.solve_none.value == np.mean(table.sum(axis=1) == 0)
    assert list(total.pass_at_k) == [1, 2, 4, 8]
    assert total.pass_at_k[8].value == np.mean(table.sum(axis=1) > 0)
    assert total.pass_at_k[1].value == pytest.approx(table.mean())
    assert total.pass_at_k[2].value == pytest.approx(np.mean([any_of_two(row) for row in table]))
    assert total.pass_at_k[2].low <= total.pass_at_k[2].value <= total.pass_at_k[2].high
    truncated = np.mean([line["is_truncated"] for line in lines[1:]])
    assert total.truncated.value == total.format_errors.value == pytest.approx(truncated)
    assert total.mean_tokens.value == 3
    assert {name: part.num_problems for name, part in found.by_source.items()} == {"others": 1, "sums": 3}
    assert {name: part.num_problems for name, part in found.by_level.items()} == {"easy": 2, "hard": 1}
    assert found.by_level["easy"].accuracy.value == pytest.approx(table[1:3].mean())


def any_of_two(correct: np.ndarray) -> float:
    """The share of pairs of samples with a right one among them, by going through all of them."""
    pairs = [(a, b) for a in range(len(correct)) for b in range(a)]
    return float(np.mean([bool(correct[a] or correct[b]) for a, b in pairs]))


def test_every_sample_has_its_own_seed() -> None:
    engine = ChanceEngine()
    run(engine)
    assert len({request.seed for request in engine.asked}) == 32
    other = ChanceEngine()
    run(other, sampling=replace(SAMPLING, seed=1))
    assert not {request.seed for request in engine.asked} & {request.seed for request in other.asked}


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    expected = run()
    engine = ChanceEngine()
    engine.dies_after = 11
    with pytest.raises(KeyboardInterrupt):
        run(engine, cache_folder=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    # What a kill in the middle of a write leaves behind.
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"problem": 3, "sam')
    again = ChanceEngine()
    assert run(again, cache_folder=tmp_path) == expected
    assert len(again.asked) == 32 - 11
    third = ChanceEngine()
    assert run(third, cache_folder=tmp_path) == expected
    assert third.asked == []


def test_more_samples_reuse_those_there_are(tmp_path: Path) -> None:
    run(cache_folder=tmp_path, num_samples=3)
    engine = ChanceEngine()
    assert run(engine, cache_folder=tmp_path, num_samples=8) == run(num_samples=8)
    assert len(engine.asked) == 4 * 5


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": replace(SAMPLING, temperature=0.5)},
        {"sampling": replace(SAMPLING, seed=9)},
        {"prompts": PROMPTS[1:]},
    ],
)
def test_anything_that_changes_the_samples_starts_anew(changes: dict[str, Any], tmp_path: Path) -> None:
    run(cache_folder=tmp_path)
    engine = ChanceEngine()
    run(engine, cache_folder=tmp_path, **changes)
    assert len(engine.asked) == 8 * len(changes.get("prompts", PROMPTS))
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_a_corrected_answer_costs_no_sampling(tmp_path: Path) -> None:
    first = run(cache_folder=tmp_path)
    engine = ChanceEngine()
    corrected = [*PROMPTS[:3], prompt(3, 10, source="others", answer="2")]
    second = run(engine, prompts=corrected, cache_folder=tmp_path)
    assert engine.asked == []
    assert first.accuracy_by_problem[3] > 0 == second.accuracy_by_problem[3]


def test_another_model_starts_anew(tmp_path: Path) -> None:
    run(cache_folder=tmp_path)
    engine = ChanceEngine()
    run_evaluation(
        evaluated(engine, "f2"), PROMPTS, data="sums", sampling=SAMPLING, num_samples=8, cache_folder=tmp_path
    )
    assert len(engine.asked) == 32


def test_a_file_has_one_writer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second one waits for the first and then has nothing left to sample."""
    second = ChanceEngine()
    found: list[EvaluationResult] = []
    thread = threading.Thread(target=lambda: found.append(run(second, cache_folder=tmp_path)))

    class First(ChanceEngine):
        def sample(self, *args: Any, **kwargs: Any) -> list[Rollout]:
            thread.start()
            while "waiting until it ends" not in caplog.text and thread.is_alive():
                time.sleep(0.01)
            assert second.asked == []
            return super().sample(*args, **kwargs)

    assert run(First(), cache_folder=tmp_path) == run()
    thread.join()
    assert found == [run()] and second.asked == []


def test_a_broken_cache_is_one_line(tmp_path: Path) -> None:
    run(cache_folder=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[:3], lines[4][9:], ""]), encoding="utf-8")
    with pytest.raises(ConfigError, match="line 4 is broken; remove the file"):
        run(cache_folder=tmp_path)


def test_responses_are_bounded_by_the_context() -> None:
    engine = ChanceEngine()
    found = run(engine, sampling=PAPER_SAMPLING)
    assert engine.sampling is not None
    assert engine.sampling.max_response_tokens == found.sampling["max_response_tokens"] == 98
    engine.max_context = 2
    with pytest.raises(ConfigError, match="the longest prompt has 2 tokens, the model's context 2"):
        run(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples: 0 is too small"),
        ({"prompts": []}, "no problem to evaluate on"),
        ({"prompts": [prompt(5, 1, answer=None)]}, "problem 5 of sums has no reward_model.ground_truth"),
        ({"prompts": [replace(prompt(6, 1), template="")]}, "problem 6 of sums is in no known template"),
    ],
)
def test_what_cannot_be_graded_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cache folder .*file: .*; give one that can be written"):
        run(cache_folder=tmp_path / "file")


def saved_model(folder: Path, favourite: int) -> str:
    """A folder of a model that says "well", then mostly its favourite answer, then ends."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="well"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="well")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        # Without attention and feed-forward the next token depends on the last one alone.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), 16))
        model.lm_head.weight.zero_()
        answers = {1: 0.2, 2: 0.2, 3: 0.2} | {favourite: 0.9}
        for answer, chance in answers.items():
            model.lm_head.weight[END, answer] = 10.0
            model.lm_head.weight[answer, WELL] = float(np.log(chance) + 8) / 4
    model.generation_config = GenerationConfig(eos_token_id=END)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.timeout(60)
def test_the_command_evaluates_folders_on_files(tmp_path: Path) -> None:
    problems = [
        {
            "prompt": [{"role": "user", "content": TEMPLATES["boxed"].render("well")}],
            "reward_model": {"ground_truth": answer},
            "data_source": "sums",
            "extra_info": {"level": index % 2},
        }
        for index, answer in enumerate(["1", "1.0", "\\frac{2}{2}", "+1"])
    ]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    before, after, teacher = (
        saved_model(tmp_path / name, favourite) for name, favourite in zip("abc", (2, 3, 1), strict=True)
    )
    text = io.StringIO()
    report = evaluate_command(
        [after],
        [str(data)],
        num_samples=12,
        before=before + "/",
        teacher=teacher,
        device="cpu",
        cache_folder=tmp_path / "cache",
        output=tmp_path / "out" / "report.json",
        console=Console(file=text, width=200),
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
    results = report["results"]
    assert [result["model"] for result in results] == ["a", "b", "c"]
    assert all(result["data"] == "sums" for result in results)
    accuracies = [result["total"]["accuracy"]["value"] for result in results]
    assert accuracies[2] > 0.5 > accuracies[0]
    assert results[0]["sampling"]["temperature"] == 0.7
    assert set(results[0]["by_level"]) == {"0", "1"}
    (recovery,) = report["gap_recovery"]
    assert recovery["model"] == "b"
    gap = accuracies[2] - accuracies[0]
    assert recovery["gap"] == pytest.approx(gap)
    assert recovery["estimate"]["value"] == pytest.approx((accuracies[1] - accuracies[0]) / gap)
    printed = text.getvalue()
    assert "avg@12" in printed and f"{accuracies[2]:.1%}" in printed and "gap" in printed
    again = evaluate_command([teacher], [str(data)], num_samples=12, device="cpu", cache_folder=tmp_path / "cache")
    assert again["results"] == results[2:]


@pytest.mark.parametrize(
    ("models_given", "changes", "message"),
    [
        ([], {}, "no model to evaluate"),
        (["a"], {"before": "a"}, "before and teacher belong together"),
        (["./nowhere"], {}, "no such folder"),
        (["a"], {"max_problems": 0}, "max_problems: 0 is too small"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    models_given: list[str], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text(json.dumps({"prompt": "1 ?"}) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        evaluate_command(models_given, [str(data)], **changes)
