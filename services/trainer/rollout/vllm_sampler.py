"""vLLM as a sampler: loads a model, samples whole requests as they end, takes new weights in place.

Runs in the engine's own process (`vllm_worker.py`). R response tokens, N ids given a position: the sampled one first,
then the most likely ones. Log-probs come in vLLM's `processed_logprobs` mode, that is of the distribution it samples
from: at the sampling temperature and, where nothing is cut, over the full vocabulary. The raw mode's are at temperature
1 whatever is sampled at.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd.errors import ConfigError, InternalError, InvalidRequestError, RolloutEngineError, first_line
from opd.types import FinishReason, Floats, Ids
from services.trainer.rollout.base import SamplingParams
from services.trainer.rollout.vllm_files import Tensors, check_version, tensors_of

_LOAD_FAULTS = (OSError, ValueError, RuntimeError, KeyError, ImportError, AssertionError)
_CPU_KV_CACHE_BYTES = 1 << 30
_CPU_BATCHED_TOKENS = 2048
_ENVIRONMENT = {
    # The engine core runs in this process too, so that one process is all there is to end.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # Else the CPU build binds this process to cores of its own choice.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
TRANSFER_CALLS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
"""The worker's side of vLLM's own weight transfer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerOptions:
    """How the model is loaded; travels to the engine's process as JSON."""

    folder: str
    """Of the model, as the trainer wrote it."""
    dtype: str
    num_defined_ids: int
    eos_token_ids: tuple[int, ...]
    max_context: int
    max_slots: int
    max_width: int
    """The most ids a position is asked for beside the sampled one."""
    gpu_memory_utilization: float
    kv_cache_bytes: int | None
    max_num_batched_tokens: int | None
    enforce_eager: bool
    takes_nccl: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One response that ended."""

    index: int
    """Of its request."""
    finish_reason: FinishReason
    token_ids_R: Ids
    ids_RN: Ids
    logprobs_RN: Floats


class VllmSampler:
    """Samples, and changes its weights between one call of `sample` and the next."""

    def __init__(self, options: SamplerOptions) -> None:
        """Loads the model; `ConfigError` in one line when vLLM cannot."""
        self.version: int | None = None
        """Of the weights in use; None before the first `load`."""
        self.is_usable = True
        """False where an update of the weights failed half-way."""
        self._options = options
        self._tensors: Tensors = tensors_of(Path(options.folder))
        os.environ.update(_ENVIRONMENT)
        try:
            self._engine = _start(options)
            _cut_vocabulary(self._engine, options.num_defined_ids)
        except _LOAD_FAULTS as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"rollout.engine=vllm: vLLM cannot load the student ({_reason(error)})") from error

    @property
    def max_context(self) -> int:
        return int(self._engine.model_config.max_model_len)

    def sample(
        self,
        prompts: Sequence[Ids],
        seeds: Sequence[int],
        sampling: SamplingParams,
        *,
        width: int,
        is_stopped: Callable[[], bool],
    ) -> Iterator[Sampled]:
        """Yields each response as it ends; `is_stopped` is asked between forward passes and ends the call.

        Raises `RolloutEngineError` while there are no whole weights, `InvalidRequestError` for what vLLM refuses.
        """
        if not self.is_usable:
            raise RolloutEngineError("the rollout engine has no whole weights: an update failed half-way; use --resume")
        waiting: dict[str, int] = {}
        internal_ids: list[str] = []
        try:
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                internal_ids.append(self._add(str(index), prompt, self._params(sampling, seed, width)))
                waiting[str(index)] = index
            while waiting and not is_stopped():
                for output in self._engine.step():
                    if output.finished and output.request_id in waiting:
                        yield _read(output, waiting.pop(output.request_id), width)
        finally:
            if waiting:
                self._engine.abort_request(internal_ids, internal=True)

    def load(self, folder: Path, version: int) -> None:
        """Takes the weights of a version; `RolloutEngineError` leaves the ones before, unless `is_usable` says not."""
        check_version(folder, version, self._tensors)
        self.is_usable = False
        try:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        except Exception as error:
            raise RolloutEngineError(f"version {version}: vLLM could not load it ({_reason(error)})") from error
        self._take_up(version)

    def transfer(self, call: str, info: dict[str, Any] | None, version: int | None) -> None:
        """One call of vLLM's weight transfer; the last one, with a version, makes the new weights the ones in use."""
        if call not in TRANSFER_CALLS:
            raise InternalError(f"weight transfer has no call {call!r}")
        # The group is made before anything is overwritten.
        self.is_usable = self.is_usable and call == TRANSFER_CALLS[0]
        try:
            self._engine.collective_rpc(call, args=() if info is None else (info,))
        except Exception as error:
            raise RolloutEngineError(f"version {version}: {call} failed ({_reason(error)})") from error
        if version is not None:
            self._take_up(version)

    def _take_up(self, version: int) -> None:
        self._engine.apply_model(_refresh_head)
        # Keys and values of the old weights would be taken for prompts seen before.
        if not self._engine.reset_prefix_cache():
            raise RolloutEngineError(f"version {version}: vLLM keeps keys and values of the version before")
        self.version, self.is_usable = version, True

    def _add(self, name: str, prompt: Ids, params: Any) -> str:
        try:
            internal_id: str = self._engine.add_request(name, {"prompt_token_ids": prompt.tolist()}, params)
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(f"prompt of {prompt.size} tokens: vLLM refuses it ({_reason(error)})") from error
        return internal_id

    def _params(self, sampling: SamplingParams, seed: int, width: int) -> Any:
        from vllm import SamplingParams as VllmParams

        return VllmParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_response_tokens,
            seed=seed,
            logprobs=width,
            # These and no others end a response: vLLM would add those of the model's generation settings.
            stop_token_ids=list(self._options.eos_token_ids),
            ignore_eos=True,
            detokenize=False,
            flat_logprobs=True,
        )


def _start(options: SamplerOptions) -> Any:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    logging.getLogger("vllm").setLevel(logging.WARNING)
    on_cuda = current_platform.is_cuda()
    kv_cache_bytes = options.kv_cache_bytes or (None if on_cuda else _CPU_KV_CACHE_BYTES)
    max_num_batched_tokens = options.max_num_batched_tokens
    if not on_cuda:
        max_num_batched_tokens = max(max_num_batched_tokens or _CPU_BATCHED_TOKENS, options.max_context)
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=options.folder,
            skip_tokenizer_init=True,
            load_format="safetensors",
            dtype=options.dtype,  # type: ignore[arg-type, unused-ignore]
            hf_overrides={"head_dtype": "float32"},
            max_model_len=options.max_context,
            max_num_seqs=options.max_slots,
            max_logprobs=options.max_width,
            logprobs_mode="processed_logprobs",
            gpu_memory_utilization=options.gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_bytes,
            max_num_batched_tokens=max_num_batched_tokens,
            # A prompt in pieces has vLLM take back what a seeded request drew, which generators on a CPU refuse.
            enable_chunked_prefill=on_cuda,
            # The rollouts of a group share their prompt's keys and values.
            enable_prefix_caching=True,
            enforce_eager=options.enforce_eager,
            weight_transfer_config=WeightTransferConfig(backend="nccl") if options.takes_nccl else None,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
    )


def _cut_vocabulary(engine: Any, num_defined_ids: int) -> None:
    """Rows without a token are neither sampled nor counted: vLLM cuts its own padding off at `org_vocab_size`."""
    if num_defined_ids < int(engine.model_config.get_vocab_size()):
        engine.apply_model(functools.partial(_cut_logits, num_defined_ids=num_defined_ids))


def _cut_logits(model: Any, *, num_defined_ids: int) -> None:
    """Runs where the weights are; the probe after each publish shows whether it did what it should."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            module.org_vocab_size = num_defined_ids


def _refresh_head(model: Any) -> None:
    """A head tied to the embedding is no weight of its own, so reloading passes it by and its packed copy stays."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _read(output: Any, index: int, width: int) -> Sampled:
    found = output.outputs[0]
    token_ids_R = np.asarray(found.token_ids, dtype=np.int32)
    flat, shape = found.logprobs, (token_ids_R.size, width + 1)
    if found.finish_reason not in ("stop", "length") or flat is None or len(flat.logprobs) != shape[0] * shape[1]:
        raise InternalError(f"request {index}: vLLM left out rows, or ended it with {found.finish_reason!r}")
    return Sampled(
        index=index,
        finish_reason=FinishReason.STOP if found.finish_reason == "stop" else FinishReason.LENGTH,
        token_ids_R=token_ids_R,
        ids_RN=np.reshape(np.asarray(flat.token_ids, dtype=np.int32), shape),
        logprobs_RN=np.reshape(np.asarray(flat.logprobs, dtype=np.float32), shape),
    )


def _reason(error: BaseException) -> str:
    """The line that says most: pydantic puts a headline before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1][:240] if len(lines) > 1 and "validation error" in lines[0] else first_line(error)
