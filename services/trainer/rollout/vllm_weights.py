"""New weights into vLLM after each step, and the proof that they arrived.

Publishing is: send a version, have the engine acknowledge it, then let the engine sample a few tokens and compare its
log-probs with the trainer's own. A difference above the bound ends the run: rollouts of other weights than the trained
ones look sound and train on the wrong policy.
"""

import socket
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from opd.errors import RolloutEngineError
from opd.ops import score_rows
from opd.types import Ids, Rollout
from services.trainer.memory import FOR_PUBLISHING, is_out_of_memory, memory_errors
from services.trainer.rollout.base import RolloutEngine, RolloutRequest, SamplingParams, derive_seed
from services.trainer.rollout.vllm_files import VersionFolder
from services.trainer.rollout.vllm_process import VllmProcess
from services.trainer.student import output_head

_PROBE_ROLLOUTS = 4
_PROBE_TOKENS = 16


class WeightSender(Protocol):
    """One way to the engine."""

    def send(self, version: int) -> None:
        """Returns when the engine has taken the weights up; `RolloutEngineError` when it has not."""
        ...


class FileSender:
    """Through safetensors on this machine, one version at a time."""

    def __init__(self, process: VllmProcess, folder: VersionFolder, model: Any, dtype: torch.dtype) -> None:
        self._process = process
        self._folder = folder
        self._model = model
        self._dtype = dtype

    def send(self, version: int) -> None:
        path = self._folder.write(self._model, version, self._dtype)
        try:
            self._process.ask("load", {"folder": str(path), "version": version})
        finally:
            self._folder.forget(path)


class NcclSender:
    """From GPU to GPU by vLLM's own weight transfer; the trainer is rank 0 of a group of two.

    Written against vLLM 0.32 and not run: NCCL wants two GPUs. The probe after each publish stands guard.
    """

    def __init__(self, process: VllmProcess, model: Any, dtype: torch.dtype) -> None:
        self._process = process
        self._model = model
        self._dtype = dtype
        self._transfer: Any = None
        self._version: int | None = None

    def send(self, version: int) -> None:
        try:
            self._version = version
            if self._transfer is None:
                self._transfer = self._connect()
            self._transfer.send_weights()
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, RolloutEngineError) or is_out_of_memory(error):
                raise
            raise RolloutEngineError(
                f"version {version} was not transferred ({error}); try rollout.vllm.transfer=files"
            ) from error

    # What vLLM's trainer side calls to reach the engine.
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", version=self._version)

    def _call(self, name: str, info: Any = None, *, version: int | None = None) -> None:
        self._process.ask("transfer", {"call": name, "info": info, "version": version})

    def _connect(self) -> Any:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        model, dtype = self._model, self._dtype

        class StudentWeights(WeightSource):  # type: ignore[misc, unused-ignore]
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, dtype, tuple(value.shape)) for name, value in model.named_parameters()]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return ((name, value.detach().to(dtype)) for name, value in model.named_parameters())

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        info = NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=port, world_size=2)
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=self, source=StudentWeights())


class DriftProbe:
    """What engine and trainer say of the same few tokens."""

    def __init__(
        self, engine: RolloutEngine, model: Any, *, prompt_token_ids: Ids, num_defined_ids: int, temperature: float
    ) -> None:
        """`prompt_token_ids` is the prompt of every probe, the same through the run."""
        self._engine = engine
        self._model = model
        self._num_defined_ids = num_defined_ids
        num_tokens = min(_PROBE_TOKENS, engine.max_context - int(prompt_token_ids.size))
        self._sampling = SamplingParams(temperature=temperature, max_response_tokens=max(1, num_tokens))
        self._requests = [
            RolloutRequest(
                rollout_id=f"drift.0.{index}",
                group=0,
                prompt_token_ids=prompt_token_ids,
                seed=derive_seed("drift", index),
            )
            for index in range(_PROBE_ROLLOUTS)
        ]

    def measure(self, version: int) -> float:
        """Mean absolute difference in nats over the sampled tokens; `RolloutEngineError` for another version's."""
        rollouts = self._engine.sample(self._requests, self._sampling)
        other = {rollout.policy_version for rollout in rollouts} - {version}
        if other:
            raise RolloutEngineError(f"rollout engine: samples from version {other.pop()} after version {version}")
        differences = [rollout.sampled_logprobs - self._own_logprobs(rollout) for rollout in rollouts]
        return float(np.abs(np.concatenate(differences)).mean())

    def _own_logprobs(self, rollout: Rollout) -> Any:
        model = self._model
        device = next(model.parameters()).device
        ids_S = torch.from_numpy(np.concatenate([rollout.prompt_token_ids, rollout.response_token_ids])).long()
        ids_S = ids_S.to(device)
        first, was_training = int(rollout.prompt_token_ids.size), model.training
        model.eval()
        # As the student trains.
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model.base_model(input_ids=ids_S[None, :-1], use_cache=False, return_dict=True).last_hidden_state
            statistics = score_rows(
                hidden[0, first - 1 :],
                output_head(model),
                num_defined_ids=self._num_defined_ids,
                sampled_ids_T=ids_S[first:],
                temperature=self._sampling.temperature,
            )
        model.train(was_training)
        assert statistics.sampled_logprobs_T is not None
        return statistics.sampled_logprobs_T.cpu().numpy()


class PublishedWeights:
    """A `WeightPublisher` for an engine with weights of its own."""

    def __init__(self, engine: RolloutEngine, sender: WeightSender, probe: DriftProbe, *, max_drift: float) -> None:
        self._engine = engine
        self._sender = sender
        self._probe = probe
        self._max_drift = max_drift
        self.drift = float("nan")
        """Of the last publish, in nats."""

    def publish(self, policy_version: int) -> None:
        """See `WeightPublisher.publish`; `RolloutEngineError` when the engine is not where the trainer is."""
        # A whole copy of the weights, and the probe's pass, where the engine may have taken what was free.
        with memory_errors(FOR_PUBLISHING):
            self._sender.send(policy_version)
            self._engine.policy_version = policy_version
            self.drift = self._probe.measure(policy_version)
        # Written so that NaN is refused too.
        if not self.drift <= self._max_drift:
            raise RolloutEngineError(
                f"rollout.max_drift={self._max_drift:g}: after publishing version {policy_version} the log-probs of "
                f"engine and trainer differ by {self.drift:.3g} nats a token; raise it only where the dtype explains it"
            )

    def metrics(self) -> dict[str, float]:
        """Of the publish that followed the step."""
        return {"rollout/engine_drift": self.drift}
