"""The made-up traffic is what it says, the bytes stay within their bound, and both ways of counting agree."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.wire_traffic import Exchange, Shape, json_bytes, make_exchange, measure
from opd.types import Encoding
from opd.wire.messages import encode_reply, encode_request

SHAPE = Shape(num_rollouts=4, num_prompt=64, num_response=448, vocabulary=151_936, overlap=0.8)
MAX_BYTES = {Encoding.FLOAT16: 112, Encoding.FLOAT32: 160}


def overlaps(exchange: Exchange) -> list[int]:
    pairs = zip(exchange.request.candidate_token_ids, exchange.reply.scores.topk_token_ids, strict=True)  # type: ignore[arg-type]
    return [len(set(candidates.tolist()) & set(topk.tolist())) for candidates, topk in pairs]


@pytest.mark.parametrize("k", [1, 4, 16])
def test_made_up_scores_have_the_overlap_they_are_said_to_have(k: int) -> None:
    exchange = make_exchange(SHAPE, k, Encoding.FLOAT32, 0)
    found = overlaps(exchange)
    assert sum(found) == int(0.8 * k * 448) and max(found) - min(found) <= 1
    scores = exchange.reply.scores
    assert scores.topk_logprobs is not None and (np.diff(scores.topk_logprobs, axis=1) <= 0).all()


@pytest.mark.parametrize("encoding", Encoding)
def test_the_bodies_of_a_rollout_leave_room_for_bookkeeping(encoding: Encoding) -> None:
    exchange = make_exchange(SHAPE, 16, encoding, 0)
    bodies = len(encode_request(exchange.request)) + len(encode_reply(exchange.reply, exchange.request))
    assert 1000 + bodies < MAX_BYTES[encoding] * 448
    assert json_bytes(exchange) > 6 * bodies


async def test_links_and_redis_count_the_same(redis_url: str) -> None:
    with tempfile.TemporaryDirectory(prefix="opd-wire-") as folder:
        traffic = await measure(redis_url, Path(folder), replace(SHAPE, num_response=64), 16, Encoding.FLOAT16)
    num_tokens = 4 * 64
    links, redis = traffic.trainer_link + traffic.teacher_link, traffic.redis_in + traffic.redis_out
    # Asking Redis for its counters passes no relay.
    assert abs(links - redis) * num_tokens < 8_000
    assert 0.4 < traffic.trainer_link / links < 0.6
    assert traffic.overlap == pytest.approx(0.8, abs=1 / (16 * 64))
