"""What two models must share before their log-probs can be compared: the map from ids to tokens.

The hash is taken over the *defined* ids, not over files, so that differently written but equal tokenizers agree, and
padded embedding rows (ids without a token) play no part. Template and EOS are described too: a difference there is
worth a warning, not a refusal.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.errors import ConfigError, VocabularyMismatchError
from opd.types import TeacherInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """One side of the comparison."""

    num_defined_ids: int
    """Highest id with a token, plus one."""
    id_map_hash: str
    special_tokens: dict[str, int]
    chat_template_hash: str


def id_map_hash(id_to_token: Mapping[int, str]) -> str:
    """Hex digest over (id, token) pairs in id order; equal for equal maps, whatever file they came from."""
    digest = hashlib.sha256()
    for token_id in sorted(id_to_token):
        token = id_to_token[token_id].encode("utf-8", "surrogatepass")
        # The length keeps ("1", "2a") and ("12", "a") apart.
        digest.update(f"{token_id}:{len(token)}:".encode())
        digest.update(token)
    return digest.hexdigest()[:32]


def describe_vocabulary(tokenizer: Any) -> Vocabulary:
    """Reads a Hugging Face tokenizer; raises ConfigError when it has no tokens."""
    id_to_token = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if not id_to_token:
        raise ConfigError("tokenizer: it defines no token; point the model folder at one with tokenizer files")
    specials = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _special_names(tokenizer).items()}
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        num_defined_ids=max(id_to_token) + 1,
        id_map_hash=id_map_hash(id_to_token),
        special_tokens={name: int(token_id) for name, token_id in specials.items() if token_id is not None},
        chat_template_hash=hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else "",
    )


def _special_names(tokenizer: Any) -> dict[str, str]:
    return {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}


def check_same_vocabulary(student: Vocabulary, student_name: str, info: TeacherInfo) -> list[str]:
    """Refuses another id map, naming both sides; returns warnings about template and EOS (paper, section 5.2)."""
    if student.id_map_hash != info.id_map_hash:
        raise VocabularyMismatchError(
            f"student {student_name} ({student.num_defined_ids} ids, map {student.id_map_hash[:12]}) and teacher "
            f"{info.model} ({info.num_defined_ids} ids, map {info.id_map_hash[:12]}) map ids to different tokens; "
            "use two models with one tokenizer"
        )
    warnings = []
    if student.chat_template_hash != info.chat_template_hash:
        warnings.append(
            f"student {student_name} and teacher {info.model} use different chat templates; a template the teacher "
            "was trained with raises overlap and recovery (paper, 5.2)"
        )
    eos = student.special_tokens.get("eos_token")
    if eos is not None and info.eos_token_ids and eos not in info.eos_token_ids:
        warnings.append(
            f"student EOS {eos} is none of the teacher's {list(info.eos_token_ids)}; responses may grow without end"
        )
    return warnings
