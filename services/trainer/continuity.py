"""How a run begins: at its beginning, or where a checkpoint of the same run left it.

A run that goes on has the same prompts in the same order, as many of them a step, and the same seed; other settings may
have changed and are named. What an attempt has left after the checkpoint does not count.
"""

import logging
from typing import Any

from opd.errors import CheckpointError, ConfigError
from opd.queue.connection import hide_password
from services.trainer.checkpoint import Checkpoint, CheckpointStore
from services.trainer.config import TrainSettings
from services.trainer.probe import PROBE_FILE, remove_probe
from services.trainer.prompt_files import PreparedPrompts
from services.trainer.run_log import RunLog
from services.trainer.student import StudentOptimizer

_log = logging.getLogger(__name__)
_ORDERING = (("rollout", "prompts_per_step"), ("data", "source_weights"))
"""What decides, beside prompts and seed, which of them a step trains on."""


def starting_point(log: RunLog, store: CheckpointStore, *, resume: bool) -> Checkpoint | None:
    """The last checkpoint of a run to go on with; refuses to write over a run that is not to be resumed."""
    if resume:
        checkpoint = store.latest()
        if checkpoint is None:
            _log.warning("run_dir=%s has no checkpoint, so the run begins at its beginning", log.run_dir)
        return checkpoint
    if log.has_run() or store.folders():
        raise ConfigError(
            f"run_dir={log.run_dir}: holds a run already; use --resume to go on with it, or another folder"
        )
    return None


def check_continuity(checkpoint: Checkpoint, prompts: PreparedPrompts, settings: TrainSettings) -> None:
    """The schedule's position means nothing for other prompts or another order."""
    state = checkpoint.state
    now = public_config(settings)
    for section, name in _ORDERING:
        # A record that does not say has nothing to compare.
        before, value = state.config.get(section, {}).get(name, now[section][name]), now[section][name]
        if before != value:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder}: was made with {section}.{name}={_shown(before)}, now it is "
                f"{_shown(value)}, so that prompts would be skipped or come twice; set it back, or use another run_dir"
            )
    if state.seed != settings.seed or not prompts.are_those_of(state.prompts_digest):
        raise CheckpointError(
            f"checkpoint {checkpoint.folder}: was made with other prompts or another seed than this configuration's; "
            "give it the same data and seed, or another run_dir"
        )


def _shown(value: object) -> object:
    return "unset" if value is None else value


def restore(checkpoint: Checkpoint, optimizer: StudentOptimizer, log: RunLog, settings: TrainSettings) -> None:
    """Puts optimizer, random generators, log and probe back to where the checkpoint left them."""
    state = checkpoint.state
    optimizer.load_state_tensors(checkpoint.optimizer_tensors())
    checkpoint.restore_random_state()
    log.drop_after(state.step)
    remove_probe(log.run_dir / PROBE_FILE, after=state.step)
    now = public_config(settings)
    changed = sorted(
        name
        for name in now
        if name not in ("run_dir", "log", "http", "tracing") and now[name] != state.config.get(name)
    )
    if changed:
        _log.warning("the run goes on with other settings than it had: %s", ", ".join(changed))
    log.write_event("resume", step=state.step, changed=changed)


def begin_anew(log: RunLog) -> None:
    """What an attempt that died before its first checkpoint has left must not count as this one's past.

    It takes its probe before it writes the line of that step, so there may be the one without the other.
    """
    remove_probe(log.run_dir / PROBE_FILE)
    if log.has_run():
        log.drop_after(0)
        log.write_event("resume", step=0, changed=[])


def public_config(settings: TrainSettings) -> dict[str, Any]:
    """What is written beside the run: everything but the passwords of the queues' URLs."""
    config = settings.model_dump(mode="json")
    for teacher in (config["teacher"], *config["teachers"].values()):
        teacher["url"] = teacher["url"] and hide_password(teacher["url"])
    return config
