"""Decoders against bytes nobody should send: a value or a typed error, never anything else."""

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import OpdError, OverCapacityError
from opd.queue.frames import error_frame, ok_frame, open_frame
from opd.types import ScoreReply, ScoreRequest, Scores
from opd.wire.messages import decode_info, decode_reply, decode_request, encode_info, encode_reply
from tests.integration.teacher_server.mutations import mutate, valid_bodies
from tests.unit.teacher_server.fake_engine import fake_info

FLOATS = np.linspace(-3, 0, 12, dtype=np.float32).reshape(4, 3)
REPLY = ScoreReply(
    rollout_id="r.0.0",
    teacher_fingerprint="00ff",
    scores=Scores(sampled_logprobs=FLOATS[:, 0], topk_token_ids=np.ones((4, 3), np.int32), topk_logprobs=FLOATS),
    replica="one",
)
REQUEST = ScoreRequest(
    rollout_id="r.0.0",
    tenant="math",
    teacher="t",
    prompt_token_ids=np.array([5], np.int32),
    response_token_ids=np.arange(4, dtype=np.int32),
    candidate_token_ids=np.arange(12, dtype=np.int32).reshape(4, 3),
    score_top_k=3,
)
CODED = replace(
    REPLY, scores=replace(REPLY.scores, topk_token_ids=REQUEST.candidate_token_ids, candidate_logprobs=FLOATS)
)
BODIES = [encode_reply(reply, REQUEST) for reply in (REPLY, CODED)]


def decode_its_reply(body: bytes) -> ScoreReply:
    return decode_reply(body, REQUEST)


DECODERS: dict[str, tuple[Callable[[bytes], Any], list[bytes]]] = {
    "request": (decode_request, valid_bodies("math")),
    "reply": (decode_its_reply, BODIES),
    "info": (decode_info, [encode_info(fake_info(special_tokens={"eos": 3}))]),
    "frame": (open_frame, [ok_frame(BODIES[0]), error_frame(OverCapacityError("full", retry_after_s=2.0))]),
}


def survives(decode: Callable[[bytes], Any], body: bytes) -> None:
    with suppress(OpdError):
        decode(body)


@pytest.mark.parametrize("name", DECODERS)
def test_mutated_messages(name: str) -> None:
    decode, bodies = DECODERS[name]
    generator = random.Random(5)
    for _ in range(3000):
        survives(decode, mutate(generator, bodies))


@pytest.mark.parametrize("name", DECODERS)
@given(body=st.binary(max_size=300))
@settings(deadline=None, max_examples=300)
def test_any_bytes(name: str, body: bytes) -> None:
    survives(DECODERS[name][0], body)
