"""What one run of `opd score FILE` is told; the part that decides the values is written beside them."""

import dataclasses
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
"""Of the output's columns; another one is not resumed."""


class Overlong(StrEnum):
    """What happens to a row above the teacher's context."""

    SKIP = "skip"
    """Kept without scores, with its reason."""
    TRUNCATE = "truncate"
    """Its response is cut to what fits, and the row says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFileSettings:
    """One run. Example: ``ScoreFileSettings(source=Path("a.jsonl"), target=Path("a.parquet"), score_top_k=16)``."""

    source: Path
    """.jsonl or .parquet."""
    target: Path
    score_top_k: int
    wants_entropy: bool = True
    prompt_column: str = "prompt"
    response_column: str = "response"
    candidates_column: str | None = None
    """Holds a list of token ids per response token."""
    teacher_temperature: float = 1.0
    batch_invariant: bool = False
    overlong: Overlong = Overlong.SKIP
    tokenizer: str | None = None
    teacher: str = "teacher"
    tenant: str = "default"
    timeout_s: float = 300.0
    max_in_flight: int = 64
    """Rows sent and not yet written down: bounds the memory together with `rows_per_part`."""
    rows_per_part: int = 256
    """Rows of one part, and of one row group of the output."""
    overwrite: bool = False

    def manifest(self, fingerprint: str) -> dict[str, Any]:
        """What has to be the same for finished parts to count."""
        names = (
            *("score_top_k", "wants_entropy", "prompt_column", "response_column", "candidates_column"),
            *("teacher_temperature", "batch_invariant", "overlong", "rows_per_part"),
        )
        values = dataclasses.asdict(self)
        manifest = {name: values[name] for name in names}
        manifest |= {"schema_version": SCHEMA_VERSION, "teacher_fingerprint": fingerprint}
        plain: dict[str, Any] = json.loads(json.dumps(manifest))
        return plain
