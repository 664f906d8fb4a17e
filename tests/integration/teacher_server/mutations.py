"""Messages that nobody should send: valid ones with flipped bits, cut off, spliced, and plain noise."""

import json
import random
from typing import Any

import numpy as np

from opd.types import Encoding
from opd.wire.messages import encode_request
from tests.unit.teacher_server.tiny_teachers import make_request

_ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, -(2**70), 1e308, float("nan"), float("inf"), "", "*", "\ud800", "a" * 300,
    "\x00", [], [[]], {}, [1, "x"], [[1], [1, 2]], {"a": {"b": []}}, [2**40], [-1], "../..", "math\n",
]  # fmt: skip


def valid_bodies(tenant: str) -> list[bytes]:
    """Encoded requests of every shape that a client sends."""
    generator = np.random.default_rng(0)
    wants: list[dict[str, Any]] = [
        {},
        {"score_top_k": 4, "wants_entropy": True},
        {"candidate_token_ids": generator.integers(1, 60, (7, 3)).astype(np.int32), "encoding": Encoding.FLOAT16},
        {"teacher_temperature": 0.7, "scored_rows": np.array([True, False] * 3 + [True])},
        {"batch_invariant": True, "teacher_fingerprint": "00ff", "attempt": 3},
    ]
    return [
        encode_request(make_request(seed, tenant=tenant, timeout_ms=20_000, **changes))
        for seed, changes in enumerate(wants)
    ]


def mutate(generator: random.Random, bodies: list[bytes]) -> bytes:
    """One broken message; sometimes it is still a valid one."""
    body = bytearray(generator.choice(bodies))
    kind = generator.randrange(6)
    if kind == 0:
        for _ in range(generator.randint(1, 8)):
            body[generator.randrange(len(body))] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del body[generator.randrange(len(body)) :]
    elif kind == 2:
        other = generator.choice(bodies)
        body[generator.randrange(len(body)) :] = other[generator.randrange(len(other)) :]
    elif kind == 3:
        place = generator.randrange(len(body))
        body[place:place] = generator.randbytes(generator.randint(1, 40))
    elif kind == 4:
        body = bytearray(generator.randbytes(generator.randint(0, 400)))
    else:
        # A further field at the end wins over the one before: numbers, strings and messages of any size.
        body += _field(generator)
    return bytes(body)


def _field(generator: random.Random) -> bytes:
    number = generator.randint(1, 25)
    if generator.random() < 0.5:
        return _varint(number << 3) + _varint(
            generator.choice([0, 1, 2**31, 2**32 - 1, 2**63, generator.getrandbits(16)])
        )
    content = generator.choice([b"", generator.randbytes(9), b"\xff\xfe", b"\x08\x01\x12\x05\xff\xff\xff\xff\x0f"])
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def mutate_json(generator: random.Random, tenant: str) -> bytes:
    """A broken body of /v1/score."""
    body: dict[str, Any] = {
        "prompt_token_ids": [1, 2, 3],
        "response_token_ids": [4, 5],
        "tenant": tenant,
        "candidate_token_ids": [[1, 2], [3, 4]],
        "score_top_k": 2,
        "teacher_temperature": 1.0,
        "timeout_ms": 20_000,
        "rollout_id": "r",
    }
    kind = generator.randrange(5)
    if kind == 0:
        depth = generator.choice([10, 1000, 20_000])
        return b"[" * depth + b"]" * generator.choice([0, depth])
    for _ in range(generator.randint(1, 3)):
        name = generator.choice([*body, "surplus", "\udfff"])
        body[name] = generator.choice(_ODD_VALUES)
    text = bytearray(json.dumps(body).encode())
    if kind == 1:
        for _ in range(generator.randint(1, 5)):
            text[generator.randrange(len(text))] ^= 1 << generator.randrange(8)
    elif kind == 2:
        del text[generator.randrange(len(text)) :]
    return bytes(text)
