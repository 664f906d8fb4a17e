"""Whether the parts of `opd` that an experiment rests on are there."""

from collections.abc import Collection


def missing_needs(needs: Collection[str]) -> list[str]:
    """Those of `opd COMMAND` and `objective.kind=KIND` that this version does not have."""
    from services.cli import app
    from services.trainer.objectives.config import ObjectiveKind

    callbacks = [(command.name, getattr(command.callback, "__name__", "")) for command in app.registered_commands]
    commands = {name or callback.replace("_", "-") for name, callback in callbacks}
    known = {f"opd {name}" for name in commands} | {f"objective.kind={kind}" for kind in ObjectiveKind}
    return sorted(set(needs) - known)
