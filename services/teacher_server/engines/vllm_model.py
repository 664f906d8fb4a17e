"""Loading a model into vLLM for scoring, in this process, and finding out what the loaded runner supplies exactly.

vLLM normalises log-probs in fp32 over the rows of the output head that the configuration counts. Three things stand
between that and exact scores, and each is settled here: the head runs in fp32 (vLLM would round logits to the model's
dtype); rows without a token are cut off before the normaliser; a probe compares what comes back with what it must be.
Per-position ids exist in the V2 model runner only, which runner is at work depends on platform, Triton and model, so
the runner is asked with a probe and not guessed.
"""

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd.errors import ConfigError, OpdError
from opd.types import Capability
from opd.vocabulary import Vocabulary
from services.teacher_server.config import VllmSettings
from services.teacher_server.engines.transformers_model import choose_dtype, load_vocabulary
from services.teacher_server.engines.vllm_requests import FixedIds, VllmRun, run_alone

_log = logging.getLogger(__name__)
_CPU_KV_CACHE_BYTES = 1 << 30
_LOAD_FAULTS = (OSError, ValueError, RuntimeError, KeyError, ImportError, AssertionError)
_PROBE_TOLERANCE = 1e-3
_VLLM_ENVIRONMENT = {
    # The engine core is called in this process, from the engine thread: nothing is left behind when the process dies.
    # (Only tensor parallelism has workers; they watch a pipe to this process and end with it.)
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # Else the CPU build binds this whole process to cores of its own choice.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedVllm:
    """A model that vLLM serves, and what is known of it."""

    engine: Any
    """vllm.v1.engine.llm_engine.LLMEngine."""
    vocabulary: Vocabulary
    vocab_rows: int
    eos_token_ids: tuple[int, ...]
    max_context: int
    """One less than vLLM's: it keeps a place for a token that it samples and nobody asked for."""
    dtype_name: str
    capabilities: frozenset[Capability]


def load_vllm(
    folder: Path, *, device: str, dtype: str, max_context: int, max_candidates: int, settings: VllmSettings
) -> LoadedVllm:
    """Loads, cuts the vocabulary and probes; raises ConfigError in one line."""
    vocabulary, tokenizer_eos = load_vocabulary(folder)
    platform = _import_platform(settings)
    dtype_name = choose_dtype(dtype, _device(device, platform))
    # Ties at the end of a top-k are settled by asking for more ids, at worst for all.
    max_logprobs = max(vocabulary.num_defined_ids, max_candidates + 1)
    engine = _start(folder, platform, dtype_name, max_context, max_logprobs, settings)
    vocab_rows = int(engine.model_config.get_vocab_size())
    try:
        _cut_vocabulary(folder, engine, vocabulary.num_defined_ids, vocab_rows)
        _check_normalizer(folder, engine, vocabulary.num_defined_ids)
        capabilities = _find_capabilities(engine, settings)
    except BaseException as error:
        stop_vllm(engine)
        if isinstance(error, OpdError) or not isinstance(error, _load_faults()):
            raise
        raise ConfigError(f"model={folder}: vLLM cannot compute it ({_reason(error)})") from None
    return LoadedVllm(
        engine=engine,
        vocabulary=vocabulary,
        vocab_rows=vocab_rows,
        eos_token_ids=_eos_token_ids(folder, tokenizer_eos),
        max_context=int(engine.model_config.max_model_len) - 1,
        dtype_name=dtype_name,
        capabilities=capabilities,
    )


def stop_vllm(engine: Any) -> None:
    """Ends workers, and gives memory and process groups back, so that another engine can be loaded."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def clear_cache(engine: Any) -> None:
    """Zeroes the keys and values that finished sequences left."""
    if not all(engine.apply_model(_zero_cache)):
        _log.error("vLLM's cache of keys and values was not found, so NaN left in it stays there")


def _zero_cache(model: torch.nn.Module) -> int:
    """How many tensors were zeroed. Runs where the weights are."""
    held = [getattr(module, "kv_cache", None) for module in model.modules()]
    tensors = [found for cache in held for found in (cache if isinstance(cache, list | tuple) else [cache])]
    return len([found.zero_() for found in tensors if isinstance(found, torch.Tensor)])


def _import_platform(settings: VllmSettings) -> Any:
    """vLLM reads its environment while it is imported."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine=vllm: vLLM is not installed here; run scripts/setup_vllm.sh and start the teacher with "
            ".venv-vllm/bin/python"
        )
    os.environ.update(_VLLM_ENVIRONMENT)
    if settings.batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    from vllm.platforms import current_platform

    logging.getLogger("vllm").setLevel(logging.WARNING)
    return current_platform


def _device(name: str, platform: Any) -> torch.device:
    kind = "cuda" if platform.is_cuda() else "cpu"
    if name not in ("auto", kind):
        raise ConfigError(
            f"device={name}: this vLLM is built for {kind}; use auto, and CUDA_VISIBLE_DEVICES to choose among GPUs"
        )
    return torch.device(kind)


def _start(
    folder: Path, platform: Any, dtype_name: str, max_context: int, max_logprobs: int, settings: VllmSettings
) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    kv_cache_bytes = settings.kv_cache_bytes or (None if platform.is_cuda() else _CPU_KV_CACHE_BYTES)
    try:
        return LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                skip_tokenizer_init=True,
                load_format="safetensors",
                dtype=dtype_name,
                hf_overrides={"head_dtype": "float32"},
                max_model_len=max_context + 1 if max_context else None,
                max_logprobs=max_logprobs,
                logprobs_mode="raw_logprobs",
                tensor_parallel_size=settings.tensor_parallel_size,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                kv_cache_memory_bytes=kv_cache_bytes,
                quantization=settings.quantization,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                enable_chunked_prefill=True,
                # Prompt log-probs need every row computed, so nothing would be taken from it.
                enable_prefix_caching=False,
                enforce_eager=settings.enforce_eager,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        )
    except _load_faults() as error:
        raise ConfigError(f"model={folder}: vLLM cannot load it ({_reason(error)})") from None


def _cut_vocabulary(folder: Path, engine: Any, num_defined_ids: int, vocab_rows: int) -> None:
    """Rows without a token leave the normaliser: vLLM cuts its own padding off at `org_vocab_size`, so do we."""
    if num_defined_ids > vocab_rows:
        raise ConfigError(
            f"model={folder}: the tokenizer defines {num_defined_ids} ids and the output head has only {vocab_rows} "
            "rows; use the tokenizer the model was trained with"
        )
    if num_defined_ids == vocab_rows:
        return
    engine.apply_model(functools.partial(_cut_logits, num_defined_ids=num_defined_ids))
    config = engine.model_config
    num_columns = engine.apply_model(
        functools.partial(_count_columns, hidden_size=config.get_hidden_size(), dtype=config.dtype)
    )
    if any(count not in (0, num_defined_ids) for count in num_columns) or not any(num_columns):
        raise ConfigError(
            f"model={folder}: {vocab_rows - num_defined_ids} rows of its output head have no token, and vLLM computes "
            "its logits in a way this engine cannot cut; use engine=transformers"
        )


def _cut_logits(model: torch.nn.Module, *, num_defined_ids: int) -> None:
    """Runs where the weights are."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            module.org_vocab_size = num_defined_ids


def _count_columns(model: Any, *, hidden_size: int, dtype: torch.dtype) -> int:
    """How many logits a row has; 0 in a worker that is not given them. Runs where the weights are."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits_1V = model.compute_logits(torch.zeros(1, hidden_size, dtype=dtype, device=device))
    return 0 if logits_1V is None else int(logits_1V.shape[-1])


def _check_normalizer(folder: Path, engine: Any, num_defined_ids: int) -> None:
    """The probabilities of the defined ids must sum to 1; broken weights are the canary's to report."""
    run = VllmRun(token_ids=np.array([0, num_defined_ids - 1], np.int32), first_row=0, width=num_defined_ids)
    found = run_alone(engine, run)
    logprobs_V = found.ranked_logprobs_RN[0].astype(np.float64)
    total = float(np.exp(logprobs_V).sum())
    is_whole = np.array_equal(np.sort(found.ranked_ids_RN[0]), np.arange(num_defined_ids))
    if np.isfinite(logprobs_V).all() and (abs(total - 1) > _PROBE_TOLERANCE or not is_whole):
        raise ConfigError(
            f"model={folder}: vLLM does not normalise over the {num_defined_ids} defined ids (its most likely "
            f"{num_defined_ids} sum to {total:.6f}, ids without a token among them: {not is_whole}); use "
            "engine=transformers"
        )


def _find_capabilities(engine: Any, settings: VllmSettings) -> frozenset[Capability]:
    found = {Capability.SAMPLED_LOGPROBS, Capability.TEACHER_TOP_K}
    if _takes_fixed_ids(engine):
        found.add(Capability.CANDIDATE_LOGPROBS)
    if settings.batch_invariant and engine.vllm_config.device_config.device_type == "cuda":
        found.add(Capability.BATCH_INVARIANT)
    return frozenset(found)


def _takes_fixed_ids(engine: Any) -> bool:
    """Whether per-position ids are taken and say the same as the runner's own log-probs of the same ids."""
    if not engine.vllm_config.use_v2_model_runner:
        return False
    ids = np.arange(4, dtype=np.int32) % 2
    columns: FixedIds = np.stack([ids[2:], np.full(2, -1, np.int32)], axis=1)
    found = run_alone(engine, VllmRun(token_ids=ids, first_row=1, width=0, fixed_ids_RK=columns))
    if found.fixed_logprobs_RK is None or found.fixed_logprobs_RK.shape != columns.shape:
        return False
    difference_R = np.abs(found.fixed_logprobs_RK[:, 0] - found.sampled_logprobs_R)
    return bool((difference_R[np.isfinite(difference_R)] < _PROBE_TOLERANCE).all())


def _eos_token_ids(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """As Hugging Face does: the generation configuration's, else the model's, else the tokenizer's."""
    from transformers import AutoConfig, GenerationConfig

    if (folder / "generation_config.json").is_file():
        declared = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    else:
        declared = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().eos_token_id
    declared = tokenizer_eos if declared is None else declared
    found = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return tuple(int(token_id) for token_id in found)


def _load_faults() -> tuple[type[Exception], ...]:
    from vllm.exceptions import VLLMError

    return VLLMError, *_LOAD_FAULTS


def _reason(error: Exception) -> str:
    """The line that says most: pydantic puts a headline before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1 if len(lines) > 1 and "validation error" in lines[0] else 0][:240]
