"""`opd eval`: what is asked on the command line; nothing heavy is loaded before it runs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from opd.errors import ConfigError

CACHE = Path("runs/samples")
"""Where every command of this file keeps what it sampled; the same command again goes on from there."""

DataOption = Annotated[
    list[str], typer.Option("--data", help="Problem set: .parquet, .jsonl or a data set's name; may be repeated.")
]
SplitOption = Annotated[str, typer.Option(help="Of data sets by name.")]
TemplateOption = Annotated[str | None, typer.Option(help="Ask in this template: dapo or boxed.")]
MaxProblemsOption = Annotated[int | None, typer.Option(min=1, help="Only the first of each set.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Bounded by the model's context.")]
SeedOption = Annotated[int, typer.Option(help="Of sampling.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: bfloat16 on CUDA.")]
SlotsOption = Annotated[int, typer.Option(min=1, help="Responses sampled at a time.")]
ChatOption = Annotated[
    list[str] | None,
    typer.Option("--chat", help="KEY=VALUE for the chat template, e.g. enable_thinking=false.", show_default=False),
]
CacheOption = Annotated[Path, typer.Option(help="Folder of samples: goes on where it stopped.")]
JsonOption = Annotated[Path | None, typer.Option(help="Write the result as JSON.")]


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub names.", show_default=False)],
    data: DataOption,
    num_samples: Annotated[int, typer.Option(min=1, help="Responses per problem.")] = 16,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="1 keeps every token.")] = 0.95,
    max_response_tokens: MaxTokensOption = 31744,
    max_problems: MaxProblemsOption = None,
    template: TemplateOption = None,
    split: SplitOption = "train",
    before: Annotated[str | None, typer.Option(help="The model before training, for gap recovery.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The teacher, for gap recovery.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_slots: SlotsOption = 256,
    chat: ChatOption = None,
    cache: CacheOption = CACHE,
    output: JsonOption = None,
) -> None:
    """Grades models on problem sets: avg@n, pass@k, gap recovery; the paper's sampling by default."""
    from rich.console import Console

    from services.trainer.evaluation.command import evaluate_command
    from services.trainer.rollout.base import SamplingParams

    sampling = SamplingParams(temperature=temperature, top_p=top_p, max_response_tokens=max_response_tokens, seed=seed)
    evaluate_command(
        models, data, sampling=sampling, num_samples=num_samples, template=template, split=split,
        chat_template_kwargs=chat_kwargs(chat), max_problems=max_problems, before=before, teacher=teacher,
        device=device, dtype=dtype, max_slots=max_slots, cache_folder=cache, output=output, console=Console(),
    )  # fmt: skip


def chat_kwargs(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE with VALUE as JSON where it is that, else as text."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, is_pair, value = pair.partition("=")
        if not is_pair or not key:
            raise ConfigError(f"--chat {pair}: is not KEY=VALUE; e.g. enable_thinking=false")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
