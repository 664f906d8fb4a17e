"""What of the trainer's environment is the engine's too, and which GPUs it sees. Light: no torch, no vllm."""

from collections.abc import Mapping

from opd.errors import ConfigError

_LAUNCHER = "TORCHELASTIC_"
_LAUNCHERS = frozenset(
    {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}
    | {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"}
)


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what torchrun says of a rank.

    An engine is a group of one. vLLM reads LOCAL_RANK for itself, and PyTorch TORCHELASTIC_USE_AGENT_STORE wherever a
    group meets over TCP: it would look for its store at the launcher's.
    """
    return {name: value for name, value in environ.items() if name not in _LAUNCHERS and not name.startswith(_LAUNCHER)}


def engine_devices(listed: str, environ: Mapping[str, str], *, num_ranks: int, on_cuda: bool) -> str:
    """CUDA_VISIBLE_DEVICES of this rank's engine; empty leaves the trainer's.

    `listed` is `rollout.vllm.cuda_devices`, which the ranks of a machine share out in equal consecutive parts. Without
    it an engine gets the device of its rank. Example: of `4,5,6,7` the second of two ranks gives its engine `6,7`.
    `ConfigError` for a list that does not divide.
    """
    if num_ranks == 1:
        return listed
    local_rank = _number(environ, "LOCAL_RANK")
    if not listed:
        if not on_cuda:
            return ""
        visible = environ.get("CUDA_VISIBLE_DEVICES", "")
        return visible.split(",")[local_rank].strip() if visible else str(local_rank)
    names, num_local = [name.strip() for name in listed.split(",")], _number(environ, "LOCAL_WORLD_SIZE")
    if not all(names):
        raise ConfigError(f"rollout.vllm.cuda_devices={listed}: has a place without a name; write such as 4,5,6,7")
    if len(names) % num_local:
        raise ConfigError(
            f"rollout.vllm.cuda_devices={listed}: {len(names)} devices do not divide among the {num_local} processes "
            "of this machine, each with an engine of its own; name as many for each, or none to share the trainer's"
        )
    share = len(names) // num_local
    return ",".join(names[local_rank * share : (local_rank + 1) * share])


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdigit():
        raise ConfigError(f"{name}={text}: has to tell the engines of one machine apart; start with torchrun")
    return int(text)
