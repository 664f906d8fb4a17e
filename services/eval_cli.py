"""`opd eval`, `opd continuation` and `opd auroc`: nothing heavy is loaded before one of them runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opd.errors import ConfigError

if TYPE_CHECKING:
    from services.trainer.evaluation.opening import Loading
    from services.trainer.rollout.base import SamplingParams

CACHE = Path("runs/samples")
"""Where every command of this file keeps what it sampled; the same command again goes on from there."""

DataOption = Annotated[
    list[str], typer.Option("--data", help="Problem set: .parquet, .jsonl or a data set's name; may be repeated.")
]
OneDataOption = Annotated[str, typer.Option("--data", help="Problem set: .parquet, .jsonl or a data set's name.")]
SplitOption = Annotated[str, typer.Option(help="Of data sets by name.")]
TemplateOption = Annotated[str | None, typer.Option(help="Ask in this template: dapo or boxed.")]
MaxProblemsOption = Annotated[int | None, typer.Option(min=1, help="Only the first of each set.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Bounded by the model's context.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of sampling.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: bfloat16 on CUDA.")]
SlotsOption = Annotated[int, typer.Option(min=1, help="Responses sampled at a time.")]
ChatOption = Annotated[
    list[str] | None,
    typer.Option("--chat", help="KEY=VALUE for the chat template, e.g. enable_thinking=false.", show_default=False),
]
CacheOption = Annotated[Path, typer.Option(help="Folder of samples: goes on where it stopped.")]
JsonOption = Annotated[Path | None, typer.Option(help="Write the result as JSON.")]

FigureOption = Annotated[Path, typer.Option(help="Where the figure is drawn (PNG).")]


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

    evaluate_command(
        models, data, sampling=_sampling(temperature, top_p, max_response_tokens, seed),
        num_samples=num_samples, template=template, split=split,
        chat_template_kwargs=chat_kwargs(chat), max_problems=max_problems, before=before, teacher=teacher,
        device=device, dtype=dtype, max_slots=max_slots, cache_folder=cache, output=output, console=Console(),
    )  # fmt: skip


def continuation(
    student: Annotated[str, typer.Option(help="Model folder or hub name.")],
    teacher: Annotated[str, typer.Option(help="Model folder or hub name.")],
    data: OneDataOption,
    depths: Annotated[str, typer.Option(help="Tokens of the student's prefixes; 0: the teacher alone.")] = (
        "1024,2048,4096,8192,16384"
    ),
    num_samples: Annotated[int, typer.Option(min=1, help="Student rollouts per problem.")] = 1,
    num_continuations: Annotated[int, typer.Option(min=1, help="Of the teacher, per prefix.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of both; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="1 keeps every token.")] = 0.95,
    max_response_tokens: MaxTokensOption = 31744,
    max_problems: MaxProblemsOption = None,
    template: TemplateOption = None,
    split: SplitOption = "train",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_slots: SlotsOption = 256,
    chat: ChatOption = None,
    cache: CacheOption = CACHE,
    output: JsonOption = None,
    figure: FigureOption = Path("continuation.png"),
) -> None:
    """Lets the teacher go on from the student's prefixes: is it still better there? (Section 6.1 of the paper.)"""
    from rich.console import Console

    from services.trainer.evaluation.studies import StudySettings, continuation_command

    settings = StudySettings(
        student=student, data=data, num_samples=num_samples, template=template, split=split, max_problems=max_problems,
        sampling=_sampling(temperature, top_p, max_response_tokens, seed), cache_folder=cache, output=output,
        figure=figure, loading=_loading(device, dtype, max_slots, chat),
    )  # fmt: skip
    continuation_command(
        settings, teacher, depths=whole_numbers("--depths", depths), num_continuations=num_continuations,
        console=Console(),
    )  # fmt: skip
    typer.echo(f"wrote {figure}")


def auroc(
    student: Annotated[str, typer.Option(help="Model folder or hub name.")],
    teacher: Annotated[list[str], typer.Option(help="Model folder, hub name, or URL#POOL of a pool; may be repeated.")],
    data: OneDataOption,
    num_samples: Annotated[int, typer.Option(min=1, help="Rollouts per problem.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of the student.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1 keeps every token.")] = 1.0,
    max_response_tokens: MaxTokensOption = 7168,
    max_problems: MaxProblemsOption = None,
    template: TemplateOption = None,
    split: SplitOption = "train",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_slots: SlotsOption = 256,
    chat: ChatOption = None,
    tenant: Annotated[str, typer.Option(help="A pool: who asks.")] = "default",
    token_file: Annotated[Path | None, typer.Option(help="A pool: the tenant's token; or OPD_TOKEN_FILE.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="A pool: who may sign its certificate (PEM).")] = None,
    cert_file: Annotated[Path | None, typer.Option(help="A pool: our certificate, for mutual TLS (PEM).")] = None,
    key_file: Annotated[Path | None, typer.Option(help="A pool: its key (PEM).")] = None,
    trust_network: Annotated[bool, typer.Option(help="A pool: send the token without TLS.")] = False,
    cache: CacheOption = CACHE,
    output: JsonOption = None,
    figure: FigureOption = Path("auroc.png"),
) -> None:
    """Does a teacher's mean reward tell right rollouts from wrong ones? No evidence of success. (Section 6.2.)"""
    from rich.console import Console

    from opd.credentials import load_credentials
    from services.trainer.evaluation.studies import StudySettings, auroc_command

    settings = StudySettings(
        student=student, data=data, num_samples=num_samples, template=template, split=split, max_problems=max_problems,
        sampling=_sampling(temperature, top_p, max_response_tokens, seed), cache_folder=cache, output=output,
        figure=figure, loading=_loading(device, dtype, max_slots, chat),
    )  # fmt: skip
    credentials = load_credentials(
        token_file=token_file, ca_file=ca_file, cert_file=cert_file, key_file=key_file, trust_network=trust_network
    )
    auroc_command(settings, teacher, tenant=tenant, credentials=credentials, console=Console())
    typer.echo(f"wrote {figure}")


def _sampling(temperature: float, top_p: float, max_response_tokens: int, seed: int) -> "SamplingParams":
    from services.trainer.rollout.base import SamplingParams

    return SamplingParams(temperature=temperature, top_p=top_p, max_response_tokens=max_response_tokens, seed=seed)


def _loading(device: str, dtype: str, max_slots: int, chat: list[str] | None) -> "Loading":
    from services.trainer.evaluation.opening import Loading

    return Loading(device=device, dtype=dtype, max_slots=max_slots, chat_template_kwargs=chat_kwargs(chat))


def whole_numbers(name: str, text: str) -> list[int]:
    """`16,32` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} {text}: is no list of whole numbers; e.g. 16,32,64") from None


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
