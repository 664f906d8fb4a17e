"""A small run of the comparison with TRL: both sides train for real, and mean the same by their first loss.

Needs `.venv-peer` (`make test-peer` makes it). Elsewhere it is skipped with that reason; with OPD_REQUIRE_PEER=1, which
that target sets, it fails.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
VENV = ROOT / ".venv-peer"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*arguments: str) -> dict[str, Any]:
    """The result that the benchmark prints last."""
    command = [sys.executable, "-m", "benchmarks.peer_step", "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=880, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_both_sides_train_and_their_first_losses_agree() -> None:
    if not (VENV / "bin" / "python").is_file():
        message = f"{VENV.name} is not there; `make test-peer` makes it"
        if os.environ.get("OPD_REQUIRE_PEER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    result = run("--venv", str(VENV))
    assert result["trl_versions"]["trl"] == "1.16.0"
    assert result["first_loss_trl"] > 0
    assert result["first_loss_difference"] < 1e-5 * result["first_loss_trl"]
    assert result["first_grad_norm_ours"] == pytest.approx(result["first_grad_norm_trl"], rel=1e-3)
    assert result["times_trl"] == pytest.approx(result["trl_step_s"] / result["ours_step_s"], rel=0.01)
    for side in ("ours", "trl"):
        generate, score, update = (result[f"{side}_{part}_s"] for part in ("generate", "score", "update"))
        # Each side was seen at work, and its parts do not add up to more than the whole. Ours need not wait for scores.
        assert generate > 0 and update > 0 and score >= (0 if side == "ours" else 1e-6)
        assert generate + score + update <= result[f"{side}_step_s"] * 1.01
        # 16 rollouts: more than one token each, fewer than the limit.
        assert 16 < result[f"{side}_response_tokens"] < 16 * result["max_response_tokens"]


def test_without_trl_our_side_is_measured_and_the_reason_is_given(tmp_path: Path) -> None:
    result = run("--venv", str(tmp_path))
    assert "setup_peer.sh" in result["trl_reason"] and result["ours_steps_per_s"] > 0
    absent = ("trl_steps_per_s", "trl_generate_s", "trl_update_s", "first_loss_difference", "times_trl")
    assert [result[name] for name in absent] == [None] * len(absent)
