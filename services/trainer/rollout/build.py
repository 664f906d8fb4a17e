"""From the configuration to what samples: the engine, the one for evaluations, and how weights reach them."""

import importlib.util
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd.errors import ConfigError
from opd.types import Ids
from services.trainer.config import TrainSettings
from services.trainer.distributed.publishing import PublishedByAll, worst_of_all
from services.trainer.distributed.ranks import Ranks
from services.trainer.models import LoadedModel
from services.trainer.rollout.base import RolloutEngine
from services.trainer.rollout.completed import CompletedRollouts
from services.trainer.rollout.settings import EngineKind, WeightTransfer
from services.trainer.rollout.transformers_engine import TransformersEngine
from services.trainer.rollout.vllm_engine import VllmEngine, asked_width
from services.trainer.rollout.vllm_environment import engine_devices
from services.trainer.rollout.vllm_files import VersionFolder
from services.trainer.rollout.vllm_process import VllmProcess
from services.trainer.rollout.vllm_sampler import SamplerOptions
from services.trainer.rollout.vllm_weights import DriftProbe, FileSender, NcclSender, PublishedWeights, WeightSender
from services.trainer.student import Student
from services.trainer.support_pass import SupportPass
from services.trainer.weights import SharedWeights, WeightPublisher

_PROBE_PROMPT_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Engines:
    """What a run samples with."""

    training: RolloutEngine
    evaluation: RolloutEngine
    """Records nothing but tokens."""
    weights: WeightPublisher
    metrics: Callable[[], dict[str, float]] = dict
    """What there is to say of the last publish; collective where there are several ranks."""


def build_engines(
    settings: TrainSettings, loaded: LoadedModel, opened: ExitStack, *, probe_prompt: Ids, ranks: Ranks
) -> Engines:
    """Raises `ConfigError` when the engine cannot be had; what was started is closed with `opened`.

    An engine with weights of its own is compared with the trainer on `probe_prompt`, a prompt of the run. Each of
    several `ranks` has one of its own, started within `gathered`, and publishes with the others outside of it.
    """
    if settings.rollout.engine is EngineKind.VLLM:
        alone = _vllm(settings, loaded, opened, probe_prompt, ranks)
        return alone if ranks.num_ranks == 1 else _of_all_ranks(alone, loaded.model, ranks)
    training = _transformers(settings, loaded, score_top_k=settings.objective.score_top_k)
    return Engines(
        training=training,
        evaluation=_transformers(settings, loaded, score_top_k=None),
        weights=SharedWeights(training),
    )


def _transformers(settings: TrainSettings, loaded: LoadedModel, *, score_top_k: int | None) -> TransformersEngine:
    return TransformersEngine(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        num_defined_ids=loaded.num_defined_ids,
        score_top_k=score_top_k,
        max_slots=settings.rollout.max_slots,
        num_threads=settings.rollout.threads,
        # As the student trains, so that sampling and training see the same distribution.
        autocast_dtype=torch.bfloat16 if loaded.model.device.type == "cuda" else None,
    )


def _of_all_ranks(engines: Engines, model: Any, ranks: Ranks) -> Engines:
    weights = PublishedByAll(engines.weights, model, ranks)
    return replace(engines, weights=weights, metrics=worst_of_all(ranks, engines.metrics))


def _vllm(settings: TrainSettings, loaded: LoadedModel, opened: ExitStack, prompt: Ids, ranks: Ranks) -> Engines:
    rollout, options = settings.rollout, settings.rollout.vllm
    on_cuda = loaded.model.device.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    takes_nccl = _takes_nccl(settings, on_cuda=on_cuda)
    devices = engine_devices(options.cuda_devices, os.environ, num_ranks=ranks.num_ranks, on_cuda=on_cuda)
    folder = VersionFolder(options.weights_folder)
    opened.callback(folder.close)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    process = VllmProcess(
        python=options.python,
        environment={"CUDA_VISIBLE_DEVICES": devices} if devices else {},
        log=settings.run_dir / log_file(ranks.rank),
        patience_s=options.patience_s,
    )
    opened.callback(process.close)
    first = folder.write(loaded.model, -1, dtype)
    started = _sampler_options(settings, loaded, folder=first, dtype=dtype, takes_nccl=takes_nccl)
    max_context = process.start(asdict(started), folder.path)
    folder.forget(first)

    def engine(score_top_k: int | None) -> VllmEngine:
        return VllmEngine(
            process, num_defined_ids=loaded.num_defined_ids, max_context=max_context, score_top_k=score_top_k
        )

    training = engine(settings.objective.score_top_k)
    sender: WeightSender = FileSender(process, folder, loaded.model, dtype)
    if takes_nccl:
        sender = NcclSender(process, loaded.model, dtype)
    probe = DriftProbe(
        training,
        loaded.model,
        prompt_token_ids=prompt[-_PROBE_PROMPT_TOKENS:],
        num_defined_ids=loaded.num_defined_ids,
        temperature=rollout.temperature,
    )
    weights = PublishedWeights(
        training, sender, probe, max_drift=rollout.max_drift or (1e-3 if dtype == torch.float32 else 0.1)
    )
    return Engines(training=training, evaluation=engine(None), weights=weights, metrics=weights.metrics)


def log_file(rank: int) -> str:
    """Name of what a rank's engine prints, in the run folder."""
    return f"rollout-engine-{rank}.log" if rank else "rollout-engine.log"


def _sampler_options(
    settings: TrainSettings, loaded: LoadedModel, *, folder: Path, dtype: torch.dtype, takes_nccl: bool
) -> SamplerOptions:
    rollout, options = settings.rollout, settings.rollout.vllm
    needed = rollout.max_prompt_tokens + rollout.max_response_tokens
    longest = int(getattr(loaded.model.config.get_text_config(), "max_position_embeddings", needed))
    return SamplerOptions(
        folder=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        num_defined_ids=loaded.num_defined_ids,
        eos_token_ids=loaded.eos_token_ids,
        # Evaluations use as much of the student's context as their settings allow.
        max_context=longest if settings.evaluation.files else min(needed, longest),
        max_slots=rollout.max_slots,
        max_width=asked_width(settings.objective.score_top_k, loaded.num_defined_ids),
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_bytes=options.kv_cache_bytes,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enforce_eager=options.enforce_eager,
        takes_nccl=takes_nccl,
    )


def _takes_nccl(settings: TrainSettings, *, on_cuda: bool) -> bool:
    options = settings.rollout.vllm
    has_vllm = importlib.util.find_spec("vllm") is not None
    if options.transfer is WeightTransfer.AUTO:
        return on_cuda and bool(options.cuda_devices) and has_vllm and settings.student.lora is None
    if options.transfer is WeightTransfer.FILES:
        return False
    if not on_cuda or not options.cuda_devices:
        raise ConfigError(
            f"rollout.vllm.transfer=nccl with the student on {'cuda' if on_cuda else 'the CPU'} and "
            f"rollout.vllm.cuda_devices={options.cuda_devices!r}: it goes from one GPU to another; name the "
            "engine's, or use transfer=files"
        )
    if not has_vllm:
        raise ConfigError(
            "rollout.vllm.transfer=nccl: the trainer's Python has no vLLM; start the trainer with "
            ".venv-vllm/bin/python, or use transfer=files"
        )
    return True


def completed(engines: Engines, student: Student, settings: TrainSettings) -> RolloutEngine:
    """The engine that trains, with what it does not record found by the student: vLLM has no entropies."""
    if settings.rollout.engine is EngineKind.TRANSFORMERS:
        return engines.training
    completing = SupportPass(
        student=student,
        score_top_k=settings.objective.score_top_k,
        max_tokens=settings.student.max_micro_batch_tokens,
    )
    return CompletedRollouts(engines.training, completing, fraction=settings.metrics.fraction, seed=settings.seed)


def measured_too(engines: Engines, probe: Callable[[Any], dict[str, float]]) -> Callable[[Any], dict[str, float]]:
    """A step's further metrics, with what the engine has to say."""
    return lambda record: probe(record) | engines.metrics()
