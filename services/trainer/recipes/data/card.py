"""The data card: where every row went, what was taken for a duplicate of what, and hashes; as JSON and Markdown.

No time and no machine in it: the same recipe on the same files gives the same card.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from services.trainer.recipes.data.candidates import Candidate, Drop
from services.trainer.recipes.data.config import DataRecipeSettings
from services.trainer.recipes.data.pipeline import Recipe

_QUESTION_CHARS = 240


def build_card(settings: DataRecipeSettings, recipe: Recipe) -> dict[str, Any]:
    """After the output was written, since its hash is on the card."""
    embedder = recipe.embedder
    return {
        "output": {
            "file": settings.output.name,
            "sha256": file_hash(settings.output),
            "questions_sha256": questions_hash(recipe.kept),
            "rows": len(recipe.kept),
            "rows_by_source": recipe.counts[-1].num_out_by_source,
            "rows_with_answer": sum(candidate.problem.answer is not None for candidate in recipe.kept),
            "rows_in_no_template": recipe.num_bare,
            "question_chars": _quantiles([len(candidate.question) for candidate in recipe.kept]),
        },
        "inputs": [
            {"source": name, "file": Path(file).name, "sha256": file_hash(Path(file))}
            for name, files in _input_files(settings)
            for file in files
        ],
        "against_rows": recipe.num_against,
        "stages": [
            {
                "stage": count.stage,
                "in": count.num_in,
                "out": count.num_out,
                "dropped": count.dropped,
                "out_by_source": count.num_out_by_source,
            }
            for count in recipe.counts
        ],
        "embeddings": embedder
        and {"backend": str(embedder.backend), "model": embedder.model, "sha256": embedder.fingerprint},
        "examples": _examples(recipe.drops, settings.card.num_examples),
        "settings": settings.model_dump(mode="json"),
    }


def drop_record(drop: Drop) -> dict[str, Any]:
    """One dropped row for reading and for looking it up again."""
    record: dict[str, Any] = {"reason": str(drop.reason), **_place(drop.candidate)}
    if drop.partner is not None:
        record["partner"] = _place(drop.partner)
    if drop.similarity is not None:
        record["similarity"] = round(drop.similarity, 4)
    if drop.num_tokens is not None:
        record["num_tokens"] = drop.num_tokens
    return record


def as_markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    output = card["output"]
    lines = [
        f"# {output['file']}",
        "",
        f"{output['rows']} rows, {output['rows_with_answer']} of them with an answer. Embeddings: {_embeddings(card)}.",
        "",
        "| stage | in | out | dropped | out by source |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {stage['stage']} | {stage['in']} | {stage['out']} | {_pairs(stage['dropped'])} | "
        f"{_pairs(stage['out_by_source'])} |"
        for stage in card["stages"]
    ]
    lines += ["", "| input | source | sha256 |", "|---|---|---|"]
    lines += [f"| {item['file']} | {item['source']} | {item['sha256'] or 'not a file'} |" for item in card["inputs"]]
    lines += ["", f"Output sha256 {output['sha256']}; questions sha256 {output['questions_sha256']}."]
    for reason, records in card["examples"].items():
        lines += ["", f"## Dropped: {reason}", ""]
        lines += [_example_line(record) for record in records]
    return "\n".join(lines) + "\n"


def questions_hash(candidates: Sequence[Candidate]) -> str:
    """Of the questions in order, whatever form they are written in."""
    digest = hashlib.sha256()
    for candidate in candidates:
        digest.update(candidate.question.encode() + b"\0")
    return digest.hexdigest()


def file_hash(path: Path) -> str | None:
    """None for what is no file, such as a data set's name."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _input_files(settings: DataRecipeSettings) -> list[tuple[str, tuple[str, ...]]]:
    return [*((name, source.files) for name, source in settings.sources.items()), ("against", settings.against.files)]


def _examples(drops: Sequence[Drop], num_examples: int) -> dict[str, list[dict[str, Any]]]:
    """Of each reason: those nearest to the threshold, where people would judge otherwise first, and else the first."""
    by_reason: dict[str, list[Drop]] = {}
    for drop in drops:
        by_reason.setdefault(str(drop.reason), []).append(drop)
    shown = {}
    for reason, found in by_reason.items():
        nearest_first = sorted(found, key=lambda drop: drop.similarity if drop.similarity is not None else 0.0)
        shown[reason] = [drop_record(drop) for drop in nearest_first[:num_examples]]
    return shown


def _place(candidate: Candidate) -> dict[str, Any]:
    return {
        "source": candidate.source,
        "file": candidate.file,
        "row": candidate.problem.index,
        "question": candidate.question,
    }


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    return {name: int(np.quantile(values, share)) for name, share in (("median", 0.5), ("p90", 0.9), ("max", 1.0))}


def _embeddings(card: Mapping[str, Any]) -> str:
    used = card["embeddings"]
    if used is None:
        return "none"
    threshold = card["settings"]["semantic"]["threshold"]
    return f"{used['backend']} ({used['model']}), cosine >= {threshold} is a duplicate"


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "-"


def _example_line(record: Mapping[str, Any]) -> str:
    line = f"- {record['source']} row {record['row']}: {_short(record['question'])}"
    if "num_tokens" in record:
        line += f" ({record['num_tokens']} tokens)"
    if "partner" in record and "similarity" in record:
        partner = record["partner"]
        line += f"\n  - {record['similarity']:.3f} to {partner['source']} row {partner['row']}: "
        line += _short(partner["question"])
    return line


def _short(question: str) -> str:
    flat = " ".join(question.split())
    return flat if len(flat) <= _QUESTION_CHARS else f"{flat[:_QUESTION_CHARS]} ..."
