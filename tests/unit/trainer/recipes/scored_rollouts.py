"""Rollouts of given tokens, with what student and teacher say of them."""

from typing import Any

import numpy as np

from opd.types import FinishReason, Rollout, ScoreRequest
from services.trainer.batch import ScoredRollout
from tests.unit.trainer.tiny_training import exact_scores

K = 5


def scored(model: Any, teacher: Any, prompt: list[int], response: list[int]) -> ScoredRollout:
    """A rollout of given tokens with the student's top-k as a rollout engine records it."""
    ids = np.array(response, np.int32)
    request = ScoreRequest(
        rollout_id=f"r.{prompt[0]}.{len(response)}", tenant="t", teacher="t",
        prompt_token_ids=np.array(prompt, np.int32), response_token_ids=ids,
        candidate_token_ids=ids[:, None], score_top_k=K, wants_sampled=True, wants_entropy=True,
    )  # fmt: skip
    own = exact_scores(model, request)
    assert own.topk_token_ids is not None and own.topk_logprobs is not None
    assert own.sampled_logprobs is not None and own.entropy is not None
    rollout = Rollout(
        rollout_id=request.rollout_id, group=0, prompt_token_ids=request.prompt_token_ids, response_token_ids=ids,
        finish_reason=FinishReason.LENGTH, rollout_logprobs=own.sampled_logprobs, topk_token_ids=own.topk_token_ids,
        topk_logprobs=own.topk_logprobs, sampled_logprobs=own.sampled_logprobs, entropy=own.entropy, policy_version=0,
    )  # fmt: skip
    asked = ScoreRequest(
        rollout_id=request.rollout_id, tenant="t", teacher="t", prompt_token_ids=request.prompt_token_ids,
        response_token_ids=ids, candidate_token_ids=own.topk_token_ids, score_top_k=K, wants_sampled=True,
        wants_entropy=True,
    )  # fmt: skip
    return ScoredRollout(rollout=rollout, scores=exact_scores(teacher, asked))
