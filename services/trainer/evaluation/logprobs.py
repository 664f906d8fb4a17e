"""How likely a model finds responses that are there already: from a local folder, or from a teacher pool.

What is read and kept is the mean over a response's positions (a sampled EOS included) of the log-prob of its token,
natural and over the full vocabulary of defined ids. Student and teachers are read alike, so that their difference is
r-bar of the paper's section 6.2.
"""

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from rich.console import Console

from opd.client import SyncScoreClient
from opd.errors import NonFiniteError
from opd.ops import score_rows
from opd.types import Ids, ScoreReply, ScoreRequest
from services.trainer.evaluation.sample_cache import SampleCache
from services.trainer.evaluation.sampling import Response, identity, progress_bar
from services.trainer.models import LoadedModel
from services.trainer.rollout.base import SamplingParams
from services.trainer.student import Student, output_head

_MAX_IN_FLIGHT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPair:
    """A prompt with a response to it."""

    prompt_token_ids: Ids
    """[P]"""
    response_token_ids: Ids
    """[R], a sampled EOS included; R >= 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanLogprob:
    """What is kept of one response."""

    problem: int
    sample: int
    value: float

    def as_json(self) -> dict[str, Any]:
        """See `SampleRecord`."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """See `SampleRecord`."""
        return cls(**found)


class LogprobSource(Protocol):
    """Who says how likely a response is."""

    name: str
    fingerprint: str
    temperature: float

    def mean_logprobs(self, pairs: Iterable[ScoredPair]) -> Iterator[float]:
        """In the order of the pairs, each as soon as it is known."""
        ...


class LocalSource:
    """A model in memory, one response at a time, so that nothing is padded."""

    def __init__(self, loaded: LoadedModel, *, name: str, temperature: float) -> None:
        """`ConfigError` for an output head of a form not known here."""
        self.name = name
        self.fingerprint = loaded.fingerprint
        self.temperature = temperature
        self._num_defined_ids = loaded.num_defined_ids
        # Made for its check that our reading of the head agrees with the model's own logits.
        self._model = Student(loaded.model, num_defined_ids=loaded.num_defined_ids).model

    def mean_logprobs(self, pairs: Iterable[ScoredPair]) -> Iterator[float]:
        """See `LogprobSource`."""
        for pair in pairs:
            yield self._mean_logprob(pair)

    def _mean_logprob(self, pair: ScoredPair) -> float:
        device = next(self._model.parameters()).device
        sequence_S = torch.from_numpy(np.concatenate([pair.prompt_token_ids, pair.response_token_ids])).long()
        sequence_S = sequence_S.to(device)
        first = pair.prompt_token_ids.size
        with torch.no_grad():
            output = self._model.base_model(input_ids=sequence_S[None, :-1], use_cache=False, return_dict=True)
            statistics = score_rows(
                output.last_hidden_state[0, first - 1 :],
                output_head(self._model),
                num_defined_ids=self._num_defined_ids,
                sampled_ids_T=sequence_S[first:],
                temperature=self.temperature,
            )
        assert statistics.sampled_logprobs_T is not None
        return float(statistics.sampled_logprobs_T.double().mean())


class PoolSource:
    """A teacher pool, by the public client; a bounded number of requests is open at a time."""

    def __init__(self, client: SyncScoreClient, *, teacher: str, tenant: str, fingerprint: str, name: str) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.temperature = 1.0
        self._client = client
        self._teacher = teacher
        self._tenant = tenant

    def mean_logprobs(self, pairs: Iterable[ScoredPair]) -> Iterator[float]:
        """See `LogprobSource`; raises the `OpdError` that came instead of a reply."""
        run = f"auroc-{secrets.token_hex(6)}"
        pending: deque[Future[ScoreReply]] = deque()
        try:
            for index, pair in enumerate(pairs):
                pending.append(self._client.submit(self._request(f"{run}.0.{index}", pair)))
                if len(pending) == _MAX_IN_FLIGHT:
                    yield _mean(pending.popleft().result())
            while pending:
                yield _mean(pending.popleft().result())
        finally:
            for future in pending:
                future.cancel()

    def _request(self, rollout_id: str, pair: ScoredPair) -> ScoreRequest:
        return ScoreRequest(
            rollout_id=rollout_id,
            tenant=self._tenant,
            teacher=self._teacher,
            prompt_token_ids=pair.prompt_token_ids,
            response_token_ids=pair.response_token_ids,
            teacher_temperature=self.temperature,
            teacher_fingerprint=self.fingerprint,
        )


def _mean(reply: ScoreReply) -> float:
    assert reply.scores.sampled_logprobs is not None
    return float(reply.scores.sampled_logprobs.astype(np.float64).mean())


def read_mean_logprobs(
    source: LogprobSource,
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Response]],
    *,
    sampled: tuple[str, SamplingParams],
    cache_folder: Path | None,
    console: Console | None,
) -> list[list[float]]:
    """For each problem and sample; what the cache does not have is read, with progress to `console`.

    `sampled` is by whom (a fingerprint) and how the responses were. Raises `NonFiniteError` naming the response.
    """
    fingerprint, sampling = sampled
    of = {"responses": identity(fingerprint, prompts, sampling)}
    cache = SampleCache(
        cache_folder,
        {"logprobs": {"model": source.fingerprint, "temperature": source.temperature, **of}},
        MeanLogprob,
    )
    missing = [one for part in responses for one in part if (one.problem, one.sample) not in cache.samples]
    num_responses = sum(len(part) for part in responses)
    pairs = (
        ScoredPair(
            prompt_token_ids=np.asarray(prompts[one.problem], np.int32),
            response_token_ids=one.token_ids,
        )
        for one in missing
    )
    try:
        with progress_bar(console) as progress:
            task = progress.add_task(
                f"{source.name} reads", total=num_responses, completed=num_responses - len(missing)
            )
            for one, value in zip(missing, source.mean_logprobs(pairs), strict=True):
                if not np.isfinite(value):
                    raise NonFiniteError(
                        f"problem {one.problem}, sample {one.sample}: log-probs of {source.name} are not finite; use "
                        "other weights or dtype float32"
                    )
                cache.add(MeanLogprob(problem=one.problem, sample=one.sample, value=value))
                progress.advance(task)
    finally:
        cache.close()
    return [[cache.samples[one.problem, one.sample].value for one in part] for part in responses]
