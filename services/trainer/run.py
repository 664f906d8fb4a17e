"""The trainer as a process: configuration, signals, exit codes. What a run is made of stands in `assembly.py`.

Exit codes: 0 finished; 1 ended by an error in mid-run, or before the first step by one that may pass (no Redis, no
teacher); 2 refused before the first step, as it would be again; 3, 130 and 143 ended by an alarm, SIGINT and SIGTERM,
resumable. Every fault that is not ours is one line on standard error. Nothing heavy is
imported before the configuration is accepted.
"""

import logging
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from opd.errors import InternalError, OpdError
from opd.lifecycle import die_with_parent
from opd.logs import configure_logging, give_up
from opd.settings import load_settings
from opd.tracing import configure_tracing
from services.trainer.alarms.desk import StoppedByAlarm
from services.trainer.config import TrainSettings
from services.trainer.distributed.share import Share
from services.trainer.loggers.config import require_packages
from services.trainer.lora_config import require_peft
from services.trainer.stop import StopRequested, StopSignal

_log = logging.getLogger(__name__)
REFUSED = 2
FAILED = 1
ALARMED = 3


def run_training(config_path: Path | None, overrides: Sequence[str], *, resume: bool) -> int:
    """Trains as configured, or goes on from the last checkpoint of the run folder; returns the exit code."""
    die_with_parent()
    try:
        settings = load_settings(TrainSettings, config_path, overrides)
    except OpdError as error:
        return _refuse(error, REFUSED)
    configure_logging(settings.log.level, as_json=settings.log.as_json, with_requests=settings.log.requests)
    try:
        close_tracing = configure_tracing(
            settings.tracing, service="opd-trainer", instance=f"{socket.gethostname()}-{os.getpid()}"
        )
    except OpdError as error:
        return _refuse(error, REFUSED)
    try:
        with StopSignal() as stop:
            return _run(settings, stop, resume=resume)
    finally:
        close_tracing()


def end_process(code: int) -> NoReturn:
    """Ends the process of a run, whose work is done and whose files are closed.

    One of several ranks ends at once: PyTorch keeps threads that talk to the others, and taking the interpreter apart
    around them now and then ends in an abort, which makes a failure of a finished run.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(settings: TrainSettings, stop: StopSignal, *, resume: bool) -> int:
    begun = False
    try:
        require_packages(settings.loggers)
        require_peft(settings.student.lora)
        from services.trainer.distributed.process_group import RankEnvironment, joined_ranks

        limits = settings.distributed
        with joined_ranks(
            RankEnvironment.read(),
            device=settings.student.device,
            timeout_s=limits.collective_timeout_s,
            silence_s=limits.silence_s,
        ) as ranks:
            Share(num_ranks=ranks.num_ranks).check(settings.rollout.prompts_per_step)
            from services.trainer.assembly import assemble
            from services.trainer.memory import FOR_START, memory_errors

            try:
                with memory_errors(FOR_START):
                    run = assemble(settings, stop, ranks, resume=resume)
                begun = True
                # Closed before an error is told, so that the last line is the reason.
                with closing(run):
                    run.train()
            except (StopRequested, StoppedByAlarm) as request:
                # Asked for, and the same on all ranks: they part in order.
                return _stopped(request, begun=begun)
    except OpdError as error:
        # Whoever starts runs again, such as a Kubernetes Job, goes by the code.
        return _refuse(error, FAILED if begun or error.retryable else REFUSED)
    return 0


def _stopped(request: StopRequested | StoppedByAlarm, *, begun: bool) -> int:
    if isinstance(request, StoppedByAlarm):
        return ALARMED
    if not begun:
        _log.info("stopped by %s before the first step", request.signal_name)
    return request.exit_code


def _refuse(error: OpdError, code: int) -> int:
    # A fault of our own needs its traceback; a user's needs its one line.
    if isinstance(error, InternalError):
        _log.error("internal error", exc_info=error)
    give_up("opd train", error)
    return code
