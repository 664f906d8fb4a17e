"""Peers of different versions: what the released schema reads of today's messages, and today's code of tomorrow's."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from opd.types import Encoding, ScoreReply, ScoreRequest, Scores, TeacherInfo
from opd.wire import messages
from opd.wire.pb import teacher_pb2 as pb

ROOT = Path(__file__).parents[3]
NEWER = b"\x82\x7d\x05newer"
"""Field 2000, a string, which no message has."""
REQUEST = ScoreRequest(
    rollout_id="run7.0.0",
    tenant="math",
    teacher="qwen",
    prompt_token_ids=np.array([5, 9, 2], np.int32),
    response_token_ids=np.array([7, 1], np.int32),
    candidate_token_ids=np.array([[7, 3], [1, 8]], np.int32),
    score_top_k=2,
    encoding=Encoding.FLOAT16,
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)
REPLY = ScoreReply(
    rollout_id="run7.0.0",
    teacher_fingerprint="abc",
    scores=Scores(
        sampled_logprobs=np.array([-0.5, -1.5], np.float32),
        candidate_logprobs=np.array([[-0.5, -2.0], [-1.5, -3.0]], np.float32),
        topk_token_ids=np.array([[7, 3], [1, 8]], np.int32),
        topk_logprobs=np.array([[-0.5, -2.0], [-1.5, -3.0]], np.float32),
    ),
)
INFO = TeacherInfo(
    teacher="qwen", fingerprint="abc", model="m", engine="e", vocab_rows=32, num_defined_ids=30, id_map_hash="h"
)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The message classes of the schema as it was last released, apart from today's."""
    path = tmp_path_factory.mktemp("released") / "teacher.bin"
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{ROOT / 'proto/released'}",
        f"--descriptor_set_out={path}",
    ]
    subprocess.run([*command, "opd/v1/teacher.proto"], check=True, cwd=ROOT, timeout=50)
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file:
        pool.Add(file)
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"opd.v1.{name}"))


def same(left: object, right: object) -> bool:
    """Field by field, arrays by value."""
    return all(
        np.array_equal(one, other, equal_nan=True) if isinstance(one, np.ndarray) else one == other
        for field in dataclasses.fields(left)  # type: ignore[arg-type]
        for one, other in [(getattr(left, field.name), getattr(right, field.name))]
    )


def test_a_released_teacher_reads_todays_request_as_meant(released: Any) -> None:
    body = messages.encode_request(REQUEST)
    old = released("ScoreRequest").FromString(body)
    assert (old.rollout_id, old.tenant, old.score_top_k, old.encoding) == ("run7.0.0", "math", 2, pb.ENCODING_FLOAT16)
    new = pb.ScoreRequest.FromString(body)
    for name in ("prompt_token_ids", "response_token_ids", "candidate_token_ids"):
        assert getattr(old, name).SerializeToString() == getattr(new, name).SerializeToString()


def test_todays_teacher_reads_a_released_request(released: Any) -> None:
    """Whatever a released trainer can say, and nothing it cannot."""
    old = released("ScoreRequest").FromString(messages.encode_request(dataclasses.replace(REQUEST, traceparent="")))
    old.DiscardUnknownFields()
    found = messages.decode_request(old.SerializeToString())
    assert same(found, dataclasses.replace(REQUEST, traceparent=""))


def test_a_released_trainer_reads_todays_reply_and_handshake(released: Any) -> None:
    reply = released("ScoreReply").FromString(messages.encode_reply(REPLY, REQUEST))
    assert reply.WhichOneof("outcome") == "scores" and reply.teacher_fingerprint == "abc"
    assert released("GetInfoResponse").FromString(messages.encode_info(INFO)).fingerprint == "abc"


def test_todays_teacher_takes_a_request_with_fields_of_tomorrow() -> None:
    body = messages.encode_request(REQUEST)
    assert same(messages.decode_request(body + NEWER), REQUEST)
    message = pb.ScoreRequest.FromString(body)
    message.prompt_token_ids.MergeFromString(NEWER)
    found = messages.decode_request(message.SerializeToString())
    assert same(found, REQUEST)
    # Equal content stays equal content, whoever asks.
    assert messages.content_key(found, "f") == messages.content_key(REQUEST, "f")


def test_todays_trainer_takes_a_reply_and_a_handshake_with_fields_of_tomorrow() -> None:
    message = pb.ScoreReply.FromString(messages.encode_reply(REPLY, REQUEST) + NEWER)
    message.scores.MergeFromString(NEWER)
    found = messages.decode_reply(message.SerializeToString(), REQUEST)
    assert same(found.scores, messages.decode_reply(messages.encode_reply(REPLY, REQUEST), REQUEST).scores)
    assert messages.decode_info(messages.encode_info(INFO) + NEWER) == messages.decode_info(messages.encode_info(INFO))
