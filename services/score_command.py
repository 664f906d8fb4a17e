"""`opd score`: asks a pool about one prompt and response, for looking by hand.

The text becomes ids with the tokenizer given, as the teacher is to see it; the table shows, for each response token,
what the teacher thinks of it and what it would rather have said.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from opd.client import SyncScoreClient
from opd.credentials import Credentials
from opd.errors import ConfigError
from opd.types import ScoreReply, ScoreRequest, TeacherInfo


def score_text(
    *,
    url: str,
    teacher: str,
    tenant: str,
    tokenizer: str,
    prompt: str,
    response: str,
    top_k: int,
    as_json: bool,
    credentials: Credentials,
) -> None:
    """Scores one response and prints a table, or one JSON object."""
    encoder = load_tokenizer(tokenizer)
    messages = [{"role": "user", "content": prompt}]
    prompt_text = encoder.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    request = ScoreRequest(
        rollout_id="by-hand.0.0",
        tenant=tenant,
        teacher=teacher,
        prompt_token_ids=_ids(encoder, prompt_text, "PROMPT"),
        response_token_ids=_ids(encoder, response, "RESPONSE"),
        score_top_k=top_k,
        wants_entropy=True,
        timeout_ms=60_000,
    )
    with SyncScoreClient.connect(
        url, teacher=teacher, tenant=tenant, patience_s=10.0, credentials=credentials
    ) as client:
        info = client.info()
        reply = client.submit(request).result()
    if as_json:
        Console().print_json(json.dumps(_plain(request, reply)))
    else:
        Console().print(_table(encoder, request, reply, info))


def load_tokenizer(tokenizer: str) -> Any:
    """`--tokenizer`; `ConfigError` where there is none."""
    from transformers import AutoTokenizer

    if Path(tokenizer).is_absolute() and not Path(tokenizer).is_dir():
        raise ConfigError(f"--tokenizer {tokenizer}: no such folder; give a model's folder or hub name")
    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise ConfigError(f"--tokenizer {tokenizer}: cannot be loaded ({reason}); give a model's folder") from error


def _ids(encoder: Any, text: str, name: str) -> Any:
    ids = np.array(encoder(text, add_special_tokens=False)["input_ids"], np.int32)
    if ids.size == 0:
        raise ConfigError(f"{name}={text!r}: has no token; give some text")
    return ids


def _table(encoder: Any, request: ScoreRequest, reply: ScoreReply, info: TeacherInfo) -> Table:
    scores = reply.scores
    table = Table(title=f"{info.teacher}: {info.model} ({reply.teacher_fingerprint[:12]}), {reply.engine_ms:.0f} ms")
    for column in ("token", "log-prob", "entropy", "the teacher's choice"):
        table.add_column(column, justify="left" if column in ("token", "the teacher's choice") else "right")
    assert scores.sampled_logprobs is not None and scores.entropy is not None
    for row, token_id in enumerate(request.response_token_ids.tolist()):
        choice = ""
        if scores.topk_token_ids is not None and scores.topk_logprobs is not None:
            pairs = zip(scores.topk_token_ids[row].tolist(), np.exp(scores.topk_logprobs[row]).tolist(), strict=True)
            choice = "  ".join(f"{encoder.decode([token])!r} {share:.2f}" for token, share in pairs)
        table.add_row(
            repr(encoder.decode([token_id])),
            f"{scores.sampled_logprobs[row]:.3f}",
            f"{scores.entropy[row]:.3f}",
            choice.replace("[", r"\["),
        )
    return table


def _plain(request: ScoreRequest, reply: ScoreReply) -> dict[str, Any]:
    scores = reply.scores
    names = ("sampled_logprobs", "topk_token_ids", "topk_logprobs", "entropy")
    arrays = {name: getattr(scores, name) for name in names}
    return {
        "teacher_fingerprint": reply.teacher_fingerprint,
        "response_token_ids": request.response_token_ids.tolist(),
        **{name: values.tolist() for name, values in arrays.items() if values is not None},
    }
