"""Mean log-probs of given responses against an independent float64 computation, and what is kept of them."""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import NonFiniteError
from opd.vocabulary import describe_vocabulary
from services.trainer.evaluation.logprobs import LocalSource, ScoredPair, read_mean_logprobs
from services.trainer.evaluation.sampling import Response
from services.trainer.models import LoadedModel
from services.trainer.rollout.base import SamplingParams
from tests.unit.trainer.tiny_training import EOS, NUM_IDS, tiny_model, tiny_tokenizer

VOCAB_ROWS = NUM_IDS + 8
SAMPLED = ("student-1", SamplingParams(max_response_tokens=9))


def loaded(model: Any) -> LoadedModel:
    """With rows of the head that stand for no token."""
    tokenizer = tiny_tokenizer()
    return LoadedModel(
        name="tiny",
        model=model,
        tokenizer=tokenizer,
        eos_token_ids=(EOS,),
        vocabulary=describe_vocabulary(tokenizer),
        fingerprint="tiny-1",
    )


def pairs(num: int) -> list[ScoredPair]:
    generator = np.random.default_rng(7)
    return [
        ScoredPair(
            prompt_token_ids=generator.integers(2, NUM_IDS, size=int(generator.integers(1, 6))).astype(np.int32),
            response_token_ids=generator.integers(2, NUM_IDS, size=int(generator.integers(1, 9))).astype(np.int32),
        )
        for _ in range(num)
    ]


def expected(model: Any, pair: ScoredPair, temperature: float) -> float:
    """By the model's own logits in float64, over the ids that stand for a token."""
    wide = copy.deepcopy(model).double()
    sequence = np.concatenate([pair.prompt_token_ids, pair.response_token_ids]).astype(np.int64)
    with torch.no_grad():
        logits = wide(input_ids=torch.from_numpy(sequence)[None], use_cache=False).logits[0, :, :NUM_IDS]
    logprobs = torch.log_softmax(logits / temperature, dim=-1).numpy()
    first = pair.prompt_token_ids.size
    return float(np.mean([logprobs[place - 1, sequence[place]] for place in range(first, sequence.size)]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_local_model_reads_as_float64_does(temperature: float) -> None:
    model = tiny_model(3, vocab=VOCAB_ROWS)
    with torch.no_grad():
        # Rows without a token would take most of the mass, were they not left out.
        model.get_output_embeddings().weight[NUM_IDS:] *= 4
    source = LocalSource(loaded(model), name="tiny", temperature=temperature)
    asked = pairs(6)
    found = list(source.mean_logprobs(asked))
    assert found == pytest.approx([expected(model, pair, temperature) for pair in asked], abs=2e-5)


class CountingSource:
    """Says minus the length of what it is given."""

    name = "counting"
    fingerprint = "counting-1"
    temperature = 1.0

    def __init__(self, *, dies_after: int | None = None, bad: float | None = None) -> None:
        self.asked: list[ScoredPair] = []
        self._dies_after = dies_after
        self._bad = bad

    def mean_logprobs(self, pairs: Iterable[ScoredPair]) -> Iterator[float]:
        for pair in pairs:
            if self._dies_after is not None and len(self.asked) == self._dies_after:
                raise KeyboardInterrupt
            self.asked.append(pair)
            yield -float(pair.response_token_ids.size) if self._bad is None else self._bad


PROMPTS = [np.array([2, 3], np.int32), np.array([4], np.int32)]
RESPONSES = [
    [
        Response(
            problem=problem,
            sample=sample,
            token_ids=np.full(problem + sample + 1, 5, np.int32),
            is_truncated=True,
            text="",
        )
        for sample in range(3)
    ]
    for problem in range(2)
]


def read(source: CountingSource, folder: Path | None) -> list[list[float]]:
    return read_mean_logprobs(source, PROMPTS, RESPONSES, sampled=SAMPLED, cache_folder=folder, console=None)


def test_what_was_read_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        read(CountingSource(dies_after=2), tmp_path)
    second = CountingSource()
    assert read(second, tmp_path) == [[-1, -2, -3], [-2, -3, -4]]
    assert [pair.response_token_ids.size for pair in second.asked] == [3, 2, 3, 4]
    assert second.asked[-1].prompt_token_ids.tolist() == [4]
    third = CountingSource()
    assert read(third, tmp_path) == read(CountingSource(), None)
    assert third.asked == []
    other = CountingSource()
    other.temperature = 0.5
    read(other, tmp_path)
    assert len(other.asked) == 6


def test_what_is_not_finite_is_named_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="problem 0, sample 0: log-probs of counting are not finite"):
        read(CountingSource(bad=float("nan")), tmp_path)
    assert read(CountingSource(), tmp_path)[0][0] == -1
