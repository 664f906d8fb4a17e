"""Loads a student, or a model to evaluate, from a Hugging Face folder or by hub name.

Weights are read from safetensors only, never from pickles. Whatever is wrong with a folder ends in one line that names
the path and the way out, before anything else is started.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import ConfigError, first_line
from opd.model_config import identifying_settings
from opd.vocabulary import Vocabulary, describe_vocabulary
from services.trainer.hub import check_hub, looks_like_a_path
from services.trainer.memory import is_out_of_memory

logger = logging.getLogger(__name__)

_INDEX_FILE = "model.safetensors.index.json"
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with everything that belongs to it."""

    name: str
    """For people: the folder's last part or the hub name."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    """Every id that ends a response, from the generation settings and the tokenizer."""
    vocabulary: Vocabulary
    fingerprint: str
    """See `model_fingerprint`: equal fingerprints sample from equal distributions."""

    @property
    def num_defined_ids(self) -> int:
        """Ids that stand for a token and have a row in the output head."""
        return min(self.vocabulary.num_defined_ids, int(self.model.get_output_embeddings().weight.shape[0]))


def load_model(path_or_name: str, *, device: str = "auto", dtype: str = "float32") -> LoadedModel:
    """Loads model and tokenizer; `ConfigError` when either is missing, broken or cannot chat.

    `device` is `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`; `dtype` one of float32, bfloat16, float16.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: unknown name {dtype!r}; choose one of {', '.join(_DTYPES)}")
    _check_folder(path_or_name)
    place = _device(device)
    tokenizer = load_tokenizer(path_or_name)
    model = _load_weights(path_or_name, _DTYPES[dtype]).to(place).eval()
    vocabulary = describe_vocabulary(tokenizer)
    eos_token_ids = _eos_token_ids(model, tokenizer, path_or_name)
    _drop_idle_sampling_flags(model)
    return LoadedModel(
        name=Path(path_or_name).name if Path(path_or_name).is_dir() else path_or_name,
        model=model,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        vocabulary=vocabulary,
        fingerprint=model_fingerprint(model, vocabulary, eos_token_ids),
    )


def require_savable(loaded: LoadedModel) -> None:
    """`ConfigError` for settings that would be refused when the trained model is written, hours from now."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            loaded.model.config.save_pretrained(folder)
            if loaded.model.generation_config is not None:
                loaded.model.generation_config.save_pretrained(folder)
    except OSError:
        # No room for temporary files says nothing of the model.
        return
    except ValueError as error:
        reason = " ".join(str(error).split())[:240]
        raise ConfigError(
            f"model {loaded.name}: could not be saved after training ({reason}); mend its "
            "generation_config.json or config.json"
        ) from error


def load_tokenizer(path_or_name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone; `ConfigError` when there is none or it has no chat template."""
    folder = Path(path_or_name)
    if not folder.is_dir():
        _check_name(path_or_name)
    # For want of files the library makes up a tokenizer without a vocabulary.
    if folder.is_dir() and not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise ConfigError(
            f"model {path_or_name}: no usable tokenizer (no tokenizer.json or vocabulary file); save one with the "
            "model by tokenizer.save_pretrained"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name, trust_remote_code=False)
    except Exception as error:  # The library raises many kinds for a broken or missing file.
        raise ConfigError(
            f"model {path_or_name}: no usable tokenizer ({first_line(error).rstrip('.')}); save one with the model by "
            "tokenizer.save_pretrained"
        ) from error
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"model {path_or_name}: its tokenizer has no chat template; take an instruction-tuned model or add "
            "chat_template.jinja to the folder"
        )
    return tokenizer


def model_fingerprint(model: PreTrainedModel, vocabulary: Vocabulary, eos_token_ids: Sequence[int]) -> str:
    """Hash over id map, ids that end a response, configuration, and every weight's name, dtype, shape and bytes."""
    of = [vocabulary.id_map_hash, sorted(eos_token_ids), identifying_settings(model.config.to_dict())]
    digest = hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _check_folder(path_or_name: str) -> None:
    """Refuses what is meant as a folder and is not a usable one, and a hub name that nobody can be asked for."""
    folder = Path(path_or_name)
    if not folder.is_dir():
        _check_name(path_or_name)
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model {path_or_name}: no config.json; give a folder written by save_pretrained")
    shards = _weight_files(folder)
    if not shards:
        found = "only pickled weights" if any(folder.glob("*.bin")) else "no weights"
        raise ConfigError(f"model {path_or_name}: {found}; save the model as safetensors")
    for shard in shards:
        _check_shard(shard)


def _check_name(name: str) -> None:
    if Path(name).exists() or looks_like_a_path(name):
        raise ConfigError(f"model {name}: no such folder; give a Hugging Face folder or a hub name")
    check_hub("model", name, is_cached=_is_cached(name))


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _weight_files(folder: Path) -> list[Path]:
    """Every safetensors file the folder needs, missing ones included."""
    index = folder / _INDEX_FILE
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model {folder}: {index.name} is no index of weights; copy the folder again") from error
    return sorted({folder / name for name in weight_map.values()})


def _check_shard(shard: Path) -> None:
    try:
        with safe_open(shard, framework="pt") as tensors:
            tensors.keys()
    except FileNotFoundError as error:
        raise ConfigError(f"model {shard.parent}: {shard.name} is missing; copy the folder again") from error
    except (SafetensorError, OSError) as error:
        reason = first_line(error).rstrip(".")
        raise ConfigError(f"model {shard.parent}: {shard.name} is broken ({reason}); copy the folder again") from error


def _load_weights(path_or_name: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path_or_name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # The library raises many kinds, from a missing hub entry to an unknown architecture.
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"model {path_or_name}: cannot be loaded ({first_line(error).rstrip('.')}); give a causal language model "
            "as a Hugging Face folder or hub name"
        ) from error
    # Random values in place of missing weights would train and evaluate without a word.
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"model {path_or_name}: {len(missing)} weights are missing, such as {missing[0]}; copy the folder again"
        )
    loaded: PreTrainedModel = model
    return loaded


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: {device!r} is unknown; choose auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {device!r} is not here ({torch.cuda.device_count()} CUDA devices); choose auto or cpu"
        )
    return place


def _drop_idle_sampling_flags(model: Any) -> None:
    """Takes away what has no effect on greedy generation: the library loads a model with it and refuses to save it."""
    generation = model.generation_config
    if generation is not None and generation.do_sample is not True:
        for name in _SAMPLING_FLAGS:
            setattr(generation, name, None)


def _eos_token_ids(model: Any, tokenizer: Any, path_or_name: str) -> tuple[int, ...]:
    declared = getattr(model.generation_config, "eos_token_id", None)
    ids = set(declared if isinstance(declared, list | tuple) else [declared]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise ConfigError(
            f"model {path_or_name}: neither its generation settings nor its tokenizer name an EOS, so no response "
            "could end; set eos_token_id in generation_config.json"
        )
    return tuple(sorted(int(token_id) for token_id in ids))
