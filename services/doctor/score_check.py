"""One request through a pool or a gRPC address, as a trainer's would go."""

import asyncio
import secrets

import numpy as np

from opd.client import ScoreClient
from opd.errors import OpdError, PermissionDeniedError, UnauthenticatedError
from opd.types import ScoreRequest
from services.doctor.findings import Finding, fail, ok, skipped
from services.doctor.plan import Plan

_SCORE_S = 20.0
_STRANGER = "doctor"
_HOW_TO = "give --tenant NAME, with its token by --token-file or OPD_TOKEN_FILE, to score as one of them"


async def check_score(plan: Plan, url: str, teacher: str) -> Finding:
    """Skipped where only tenants are served and the plan names none."""
    check = f"score by {teacher} over {url.partition('://')[0]}"
    if plan.tenants_file is not None and not plan.tenant:
        # Known beforehand: a refusal would only count among the teacher's errors.
        return skipped(check, f"is for the tenants of {plan.tenants_file} alone: {_HOW_TO}")
    try:
        async with asyncio.timeout(_SCORE_S + 5.0):
            return await _score(plan, check, url, teacher)
    except (PermissionDeniedError, UnauthenticatedError) as error:
        if not plan.tenant:
            return skipped(check, f"is refused to whom is no tenant ({error.message}): {_HOW_TO}")
        return fail(check, error.message, "as the message says; opd tenants list names who may ask")
    except OpdError as error:
        return fail(check, error.message, "as the message says; the teacher's log has more")
    except TimeoutError:
        return fail(check, f"nothing within {_SCORE_S + 5.0:g} s", "look whether a replica lives and at its log")


async def _score(plan: Plan, check: str, url: str, teacher: str) -> Finding:
    token = np.zeros(1, np.int32)
    request = ScoreRequest(
        rollout_id=f"doctor-{secrets.token_hex(4)}.0.0", tenant=plan.tenant or _STRANGER,
        teacher=teacher.partition("@")[0], prompt_token_ids=token, response_token_ids=token,
        timeout_ms=int(1000 * _SCORE_S),
    )  # fmt: skip
    credentials = plan.credentials if plan.tenant or url.startswith("grpc") else plan.redis_credentials
    client = ScoreClient.connect(
        url, teacher=request.teacher, tenant=request.tenant, patience_s=plan.patience_s, credentials=credentials
    )
    async with client:
        reply = await client.score(request)
    return ok(check, f"by {reply.replica}: waited {reply.queue_ms:.0f} ms, engine {reply.engine_ms:.0f} ms")
