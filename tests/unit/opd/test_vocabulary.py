"""Ids mean the same on both sides, or nothing is scored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError, VocabularyMismatchError
from opd.types import TeacherInfo
from opd.vocabulary import Vocabulary, check_same_vocabulary, describe_vocabulary, id_map_hash


class Tokenizer:
    """The three things that are read of a Hugging Face tokenizer."""

    def __init__(self, tokens: dict[str, int], specials: dict[str, str], template: str | None = None) -> None:
        self._tokens, self.special_tokens_map, self.chat_template = tokens, specials, template

    def get_vocab(self) -> dict[str, int]:
        return self._tokens

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self._tokens.get(token)


def vocabulary(**changes: object) -> Vocabulary:
    tokens = {"a": 0, "b": 1, "<end>": 5}
    return describe_vocabulary(Tokenizer(tokens, {"eos_token": "<end>"}, "T"))


def info(**changes: object) -> TeacherInfo:
    one = vocabulary()
    fields: dict[str, object] = {
        "teacher": "t", "fingerprint": "", "model": "big", "engine": "", "vocab_rows": 8,
        "num_defined_ids": one.num_defined_ids, "id_map_hash": one.id_map_hash, "eos_token_ids": (5,),
        "chat_template_hash": one.chat_template_hash,
    }  # fmt: skip
    return TeacherInfo(**{**fields, **changes})  # type: ignore[arg-type]


def test_description() -> None:
    described = vocabulary()
    # A hole in the map is allowed; the count says where padding rows begin.
    assert described.num_defined_ids == 6
    assert described.special_tokens == {"eos_token": 5}
    with pytest.raises(ConfigError, match="defines no token"):
        describe_vocabulary(Tokenizer({}, {}))


@given(st.dictionaries(st.integers(0, 50), st.text(max_size=3), max_size=8))
def test_hash_depends_on_the_map_and_not_on_its_order(tokens: dict[int, str]) -> None:
    assert id_map_hash(tokens) == id_map_hash(dict(reversed(tokens.items())))
    assert id_map_hash(tokens) != id_map_hash({**tokens, 51: "x"})


def test_ids_and_tokens_cannot_run_together() -> None:
    assert id_map_hash({1: "2a"}) != id_map_hash({12: "a"})


def test_another_map_is_refused_naming_both() -> None:
    with pytest.raises(VocabularyMismatchError, match=r"student small \(6 ids.*teacher big \(6 ids"):
        check_same_vocabulary(vocabulary(), "small", info(id_map_hash="other"))


def test_template_and_eos_are_warnings() -> None:
    assert check_same_vocabulary(vocabulary(), "small", info()) == []
    warnings = check_same_vocabulary(vocabulary(), "small", info(chat_template_hash="x", eos_token_ids=(1,)))
    assert len(warnings) == 2 and "template" in warnings[0] and "EOS 5" in warnings[1]
