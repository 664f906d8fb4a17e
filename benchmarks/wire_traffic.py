"""Real traffic between a trainer, Redis and a teacher, counted where it passes.

R response tokens, K = k candidates and teacher top-k. The client and the consumer are the real ones; only the scores
are made up: random ids and log-probs, which nothing could compress, with as many of the teacher's top-k among the
candidates as the overlap says. Each side reaches Redis through a relay that counts its link; Redis counts the sum.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from redis import Redis

from opd.client import ScoreClient
from opd.queue.score_consumer import ScoreConsumer
from opd.types import Encoding, Ids, ScoreReply, ScoreRequest, Scores
from opd.wire.messages import decode_reply, decode_request, encode_reply, encode_request
from services.teacher_server.http_api import reply_as_json

TEACHER, TENANT = "qwen", "math"
_FINGERPRINT = "0123456789abcdef"
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is asked for."""

    num_rollouts: int
    num_prompt: int
    num_response: int
    vocabulary: int
    overlap: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes a response token, and microseconds of one core a response token."""

    k: int
    encoding: Encoding
    trainer_link: float
    """Request out and reply in, with everything the client says to Redis."""
    teacher_link: float
    redis_in: float
    redis_out: float
    json: float
    overlap: float
    """As it came out."""
    request_us: float
    """Encoding and decoding the request."""
    reply_us: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A request and what it is to be answered."""

    request: ScoreRequest
    reply: ScoreReply


def make_exchange(shape: Shape, k: int, encoding: Encoding, index: int) -> Exchange:
    """One rollout; the overlap is exact over its rows, up to one id."""
    generator = np.random.default_rng((k, index))
    ids_R2k = _distinct(generator, shape.num_response, 2 * k, shape.vocabulary)
    logprobs_R2k = -generator.gamma(1.5, 4.0, ids_R2k.shape).astype(np.float32)
    candidates_RK, others_Rk = ids_R2k[:, :k], ids_R2k[:, k:]
    num_members_R = generator.permutation(np.diff(np.floor(shape.overlap * k * np.arange(shape.num_response + 1))))
    is_member_RK = generator.permuted(np.arange(k) < num_members_R[:, None], axis=1)
    topk_Rk = np.where(is_member_RK, candidates_RK, others_Rk)
    topk_logprobs_Rk = np.where(is_member_RK, logprobs_R2k[:, :k], logprobs_R2k[:, k:])
    order_Rk = np.lexsort((topk_Rk, -topk_logprobs_Rk), axis=1)
    request = ScoreRequest(
        rollout_id=f"bench{k}{encoding}.0.{index}",
        tenant=TENANT,
        teacher=TEACHER,
        prompt_token_ids=generator.integers(0, shape.vocabulary, shape.num_prompt, dtype=np.int32),
        response_token_ids=generator.integers(0, shape.vocabulary, shape.num_response, dtype=np.int32),
        candidate_token_ids=candidates_RK,
        score_top_k=k,
        wants_entropy=True,
        encoding=encoding,
    )
    scores = Scores(
        sampled_logprobs=-generator.gamma(1.5, 4.0, shape.num_response).astype(np.float32),
        candidate_logprobs=logprobs_R2k[:, :k],
        topk_token_ids=np.take_along_axis(topk_Rk, order_Rk, axis=1),
        topk_logprobs=np.take_along_axis(topk_logprobs_Rk, order_Rk, axis=1),
        entropy=generator.gamma(1.5, 1.0, shape.num_response).astype(np.float32),
    )
    reply = ScoreReply(
        rollout_id=request.rollout_id,
        teacher_fingerprint=_FINGERPRINT,
        scores=scores,
        queue_ms=1.5,
        engine_ms=250.0,
        replica="teacher-0",
    )
    return Exchange(request=request, reply=reply)


def _distinct(generator: np.random.Generator, num_rows: int, num_columns: int, vocabulary: int) -> Ids:
    """Rows of different ids."""
    ids = generator.integers(0, vocabulary, (num_rows, num_columns), dtype=np.int32)
    while True:
        repeated = (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(axis=1)
        if not repeated.any():
            return ids
        ids[repeated] = generator.integers(0, vocabulary, (int(repeated.sum()), num_columns), dtype=np.int32)


class CountingRelay:
    """A Unix socket that passes everything on to another one and counts both directions."""

    def __init__(self, path: Path, target: str) -> None:
        self.url = f"unix://{path}?db=0"
        self.num_bytes = 0
        self._path = path
        self._target = target
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(_CHUNK_BYTES):
                self.num_bytes += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


async def measure(redis_url: str, folder: Path, shape: Shape, k: int, encoding: Encoding) -> Traffic:
    """One exchange to warm up (connections, scripts), then the rollouts all at once."""
    exchanges = [make_exchange(shape, k, encoding, index) for index in range(shape.num_rollouts + 1)]
    replies = {exchange.request.rollout_id: exchange.reply for exchange in exchanges}
    target = redis_url.removeprefix("unix://").partition("?")[0]
    name = f"{k}-{encoding}"
    async with (
        CountingRelay(folder / f"{name}-t.sock", target) as trainer_link,
        CountingRelay(folder / f"{name}-s.sock", target) as teacher_link,
    ):
        consumer = await ScoreConsumer.connect(teacher_link.url, pool=TEACHER, name="teacher-0")
        answering = asyncio.create_task(_answer(consumer, replies))
        async with ScoreClient.connect(trainer_link.url, teacher=TEACHER, tenant=TENANT) as client:
            await client.score(exchanges[0].request)
            before = (trainer_link.num_bytes, teacher_link.num_bytes, *_redis_bytes(redis_url))
            found = await asyncio.gather(*(client.score(exchange.request) for exchange in exchanges[1:]))
            after = (trainer_link.num_bytes, teacher_link.num_bytes, *_redis_bytes(redis_url))
        answering.cancel()
        with suppress(asyncio.CancelledError):
            await answering
        await consumer.close()
    for exchange, reply in zip(exchanges[1:], found, strict=True):
        _check(exchange, reply)
    num_tokens = shape.num_rollouts * shape.num_response
    trainer, teacher, redis_in, redis_out = ((b - a) / num_tokens for a, b in zip(before, after, strict=True))
    request_us, reply_us = _codec_us(exchanges[0])
    return Traffic(
        k=k,
        encoding=encoding,
        trainer_link=trainer,
        teacher_link=teacher,
        redis_in=redis_in,
        redis_out=redis_out,
        json=sum(json_bytes(exchange) for exchange in exchanges[1:]) / num_tokens,
        overlap=float(np.mean([_overlap(exchange) for exchange in exchanges[1:]])),
        request_us=request_us,
        reply_us=reply_us,
    )


async def _answer(consumer: ScoreConsumer, replies: Mapping[str, ScoreReply]) -> None:
    while True:
        for delivery in await consumer.take(token_budget=8192):
            request = decode_request(delivery.body)
            await consumer.complete(delivery, encode_reply(replies[request.rollout_id], request))


def _redis_bytes(url: str) -> tuple[int, int]:
    with Redis.from_url(url) as redis:
        stats = redis.info("stats")
    return int(stats["total_net_input_bytes"]), int(stats["total_net_output_bytes"])


def _check(exchange: Exchange, reply: ScoreReply) -> None:
    """A small message that says the wrong thing would be no achievement."""
    sent, came = exchange.reply.scores, reply.scores
    assert sent.topk_token_ids is not None and came.topk_token_ids is not None
    assert sent.topk_logprobs is not None and came.topk_logprobs is not None
    np.testing.assert_array_equal(np.sort(sent.topk_token_ids, axis=1), np.sort(came.topk_token_ids, axis=1))
    np.testing.assert_allclose(came.topk_logprobs, sent.topk_logprobs, rtol=2**-11, atol=2**-25)


def _overlap(exchange: Exchange) -> float:
    candidates, topk = exchange.request.candidate_token_ids, exchange.reply.scores.topk_token_ids
    assert candidates is not None and topk is not None
    return float((candidates[:, :, None] == topk[:, None, :]).any(axis=1).mean())


def json_bytes(exchange: Exchange) -> int:
    """The same content as our own /v1/score says it, without HTTP's headers."""
    wanted = ("prompt_token_ids", "response_token_ids", "candidate_token_ids", "score_top_k", "wants_entropy")
    fields = {**{name: getattr(exchange.request, name) for name in wanted}, "rollout_id": exchange.request.rollout_id}
    asked = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    return sum(len(json.dumps(form, separators=(",", ":"))) for form in (asked, reply_as_json(exchange.reply)))


def _codec_us(exchange: Exchange, num_rounds: int = 20) -> tuple[float, float]:
    """Encoding plus decoding, the fastest of some rounds, a response token."""
    request, reply = exchange.request, exchange.reply
    seconds: NDArray[np.float64] = np.empty((num_rounds, 3))
    for index in range(num_rounds):
        start = time.perf_counter()
        decode_request(encode_request(request))
        middle = time.perf_counter()
        decode_reply(encode_reply(reply, request), request)
        seconds[index] = start, middle, time.perf_counter()
    best = 1e6 * np.diff(seconds, axis=1).min(axis=0) / request.response_token_ids.size
    return float(best[0]), float(best[1])


def as_plain(traffic: Traffic) -> dict[str, object]:
    """For the result line."""
    return asdict(traffic)
