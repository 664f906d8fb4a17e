"""The two sides of `gpu_score` and the float64 check, over one model of random weights."""

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.random_model import QWEN3_1_7B, QWEN3_4B, TEACHER, Load, Shape, build_model, decoder_flops_per_token
from opd.types import ScoreRequest, Scores
from opd.vocabulary import Vocabulary
from services.teacher_server.engines.passes import pad_right, plan_rectangles
from services.teacher_server.engines.transformers_engine import EngineLimits, TransformersEngine
from services.teacher_server.engines.transformers_model import LoadedModel, build_head

SHAPES = {
    "1.7b": QWEN3_1_7B,
    "4b": QWEN3_4B,
    "tiny": Shape(hidden=64, layers=2, heads=4, key_value_heads=2, head_dim=16),
}
_CHECKED_ROWS = 16


class GpuSides:
    """Model, load and engine on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        shape, self.shape_name = SHAPES[args.shape], args.shape
        self._device = torch.device(args.device)
        self._model = _loaded(shape, self._device)
        # Every round asks for the same prompts, which must not be remembered from the one before.
        self._limits = EngineLimits(max_candidates=args.k, max_score_top_k=args.k, prefix_cache_tokens=0)
        self._engine = TransformersEngine(
            self._model, teacher=TEACHER, name="random", fingerprint="0", limits=self._limits
        )
        load = Load(num_prompt=args.prompt, num_response=args.response, k=args.k, vocabulary=shape.vocabulary)
        self._requests = load.requests("gpu", args.sequences)
        self.flops_per_token = _flops_per_token(shape, args.prompt, args.response)
        self.device_name = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"

    def engine(self) -> int:
        """Scores the load."""
        outcomes = self._engine.score(self._requests)
        assert all(isinstance(outcome, Scores) for outcome in outcomes)
        return self._num_tokens()

    def floor(self) -> int:
        """The decoder over the same rectangles, and the head at the response rows in the same chunks."""
        lengths = [request.num_tokens for request in self._requests]
        with torch.inference_mode():
            for places in plan_rectangles(lengths, self._limits.max_batch_tokens, self._limits.max_padding_share):
                self._bare([self._requests[place] for place in places])
        return self._num_tokens()

    def largest_error(self) -> float:
        """Of sampled log-probs at a few rows, against a float64 product of the same hidden states and weights."""
        request = self._requests[0]
        (scores,) = self._engine.score([request])
        assert isinstance(scores, Scores) and scores.sampled_logprobs is not None
        with torch.inference_mode():
            hidden_RH = self._hidden([request])[0][:_CHECKED_ROWS].double()
            logprobs_RV = torch.log_softmax(hidden_RH @ self._model.head.weight_VH.double().T, dim=-1).cpu().numpy()
        rows = np.arange(_CHECKED_ROWS)
        expected_R = logprobs_RV[rows, request.response_token_ids[:_CHECKED_ROWS]]
        return float(np.abs(scores.sampled_logprobs[:_CHECKED_ROWS] - expected_R).max())

    def synchronize(self) -> None:
        """Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """Allocated on the device at most, weights included."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

    def _bare(self, requests: Sequence[ScoreRequest]) -> None:
        for hidden_RH in self._hidden(requests):
            for part_CH in hidden_RH.split(self._limits.row_chunk):
                self._model.head.logits(part_CH)

    def _hidden(self, requests: Sequence[ScoreRequest]) -> list[torch.Tensor]:
        """Of each request's response rows."""
        sequences = [np.concatenate([one.prompt_token_ids, one.response_token_ids[:-1]]) for one in requests]
        hidden_BTH = self._model.hidden(torch.from_numpy(pad_right(sequences)).to(self._device))
        return [
            hidden_TH[one.prompt_token_ids.size - 1 : one.num_tokens - 1]
            for one, hidden_TH in zip(requests, hidden_BTH, strict=True)
        ]

    def _num_tokens(self) -> int:
        return sum(request.num_tokens for request in self._requests)


def _loaded(shape: Shape, device: torch.device) -> LoadedModel:
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    with torch.device(device):
        model = build_model(shape, dtype).eval().requires_grad_(False)
    vocabulary = Vocabulary(
        num_defined_ids=shape.vocabulary, id_map_hash="random", special_tokens={}, chat_template_hash=""
    )
    return LoadedModel(
        decoder=model.base_model,
        head=build_head(model),
        vocabulary=vocabulary,
        eos_token_ids=(0,),
        max_context=shape.context,
        device=device,
        dtype_name=dtype,
        takes_position_ids=True,
        runs_in_threads=True,
    )


def _flops_per_token(shape: Shape, num_prompt: int, num_response: int) -> float:
    """Two for each weight a token meets, plus causal attention; the head is met by response tokens alone."""
    num_tokens = num_prompt + num_response
    head = 2 * shape.hidden * shape.vocabulary * num_response / num_tokens
    return decoder_flops_per_token(shape, num_tokens) + head
