"""Models of a few thousand weights and an independent float64 scorer for the tests of the teacher service."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.types import PAD_ID, ScoreRequest, Scores

NUM_DEFINED_IDS = 90
VOCAB_ROWS = 96
MAX_CONTEXT = 128


def save_tokenizer(folder: Path, num_tokens: int = NUM_DEFINED_IDS) -> None:
    words = {"<eos>": 0} | {f"w{index}": index for index in range(1, num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def tiny_config(**changes: Any) -> Qwen3Config:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": MAX_CONTEXT,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    return Qwen3Config(**(settings | changes))


def save_tiny_teacher(folder: Path, *, seed: int = 0, nan_token: int | None = None, nan_head: bool = False) -> Path:
    """A random Qwen3 with tokenizer; optionally with one broken embedding row, or a head of NaN."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(tiny_config())
    with torch.no_grad():
        if nan_token is not None:
            model.model.embed_tokens.weight[nan_token] = torch.nan
        if nan_head:
            model.lm_head.weight.fill_(torch.nan)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_request(seed: int = 0, *, num_prompt: int = 5, num_response: int = 7, **changes: Any) -> ScoreRequest:
    generator = np.random.default_rng(seed)
    fields: dict[str, Any] = {
        "rollout_id": f"run.0.{seed}",
        "tenant": "math",
        "teacher": "tiny",
        "prompt_token_ids": random_ids(generator, num_prompt),
        "response_token_ids": random_ids(generator, num_response),
    }
    return ScoreRequest(**(fields | changes))


def random_ids(generator: np.random.Generator, *shape: int) -> NDArray[np.int32]:
    return generator.integers(1, NUM_DEFINED_IDS, shape).astype(np.int32)


def reference_logprobs(folder: Path, request: ScoreRequest, num_defined_ids: int) -> NDArray[np.float64]:
    """[R, num_defined_ids] log-probs from a plain forward pass in float64, one sequence, nothing of ours in between."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = np.concatenate([request.prompt_token_ids, request.response_token_ids]).astype(np.int64)
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(ids).unsqueeze(0)).logits[0].double().numpy()
    first = request.prompt_token_ids.size - 1
    logits_RV = logits_TV[first : first + request.response_token_ids.size, :num_defined_ids]
    scaled_RV = logits_RV / request.teacher_temperature
    largest_R1 = scaled_RV.max(axis=1, keepdims=True)
    return scaled_RV - largest_R1 - np.log(np.exp(scaled_RV - largest_R1).sum(axis=1, keepdims=True))


def reference_scores(folder: Path, request: ScoreRequest, num_defined_ids: int = NUM_DEFINED_IDS) -> Scores:
    """All fields a request can ask for, computed with loops from the definitions."""
    logprobs_RV = reference_logprobs(folder, request, num_defined_ids)
    num_rows, k = len(logprobs_RV), request.score_top_k
    candidates_RK = request.candidate_token_ids
    order_Rk = np.array([sorted(range(num_defined_ids), key=lambda v: (-row[v], v))[:k] for row in logprobs_RV])
    return Scores(
        sampled_logprobs=np.array([row[v] for row, v in zip(logprobs_RV, request.response_token_ids, strict=True)]),
        candidate_logprobs=None if candidates_RK is None else _at(logprobs_RV, candidates_RK),
        topk_token_ids=order_Rk.reshape(num_rows, k),
        topk_logprobs=_at(logprobs_RV, order_Rk.reshape(num_rows, k).astype(int)),
        entropy=np.array([-sum(np.exp(value) * value for value in row) for row in logprobs_RV]),
    )


def _at(logprobs_RV: NDArray[np.float64], ids_RK: NDArray[Any]) -> Any:
    rows: Sequence[Any] = [
        [row[v] if v != PAD_ID else np.nan for v in ids] for row, ids in zip(logprobs_RV, ids_RK, strict=True)
    ]
    return np.array(rows)
