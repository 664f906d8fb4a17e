"""`opd score`: one response for looking at, or with `--out` a whole file of them."""

from pathlib import Path
from typing import Annotated

import typer

from opd.credentials import load_credentials
from opd.errors import ConfigError


def score(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT|FILE", help="What the user says; with --out, the file.")],
    url: Annotated[str, typer.Option(envvar="OPD_REDIS_URL", help="redis(s)://, unix:// or grpc(s)://host:port.")],
    response: Annotated[
        str | None, typer.Argument(help="The response to score; none with --out.", show_default=False)
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub name of the teacher's tokenizer.")] = None,
    teacher: Annotated[str, typer.Option(help="The pool's name.")] = "teacher",
    tenant: Annotated[str, typer.Option(help="Who asks.")] = "default",
    top_k: Annotated[int | None, typer.Option(min=0, help="The teacher's choices: 4 of a text, 16 of a file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A text: one JSON object instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="Score a .jsonl or .parquet FILE into this parquet file.")] = None,
    prompt_column: Annotated[str, typer.Option(help="File: text, messages or token ids.")] = "prompt",
    response_column: Annotated[str, typer.Option(help="File: text or token ids.")] = "response",
    candidates_column: Annotated[str | None, typer.Option(help="File: lists of ids, one per response token.")] = None,
    overlong: Annotated[str, typer.Option(help="File: skip or truncate rows above the teacher's context.")] = "skip",
    batch_invariant: Annotated[bool, typer.Option("--batch-invariant", help="File: bit-equal when repeated.")] = False,
    max_in_flight: Annotated[int, typer.Option(min=1, help="File: rows asked for at a time.")] = 64,
    rows_per_part: Annotated[int, typer.Option(min=1, help="File: rows kept at a time by a run cut off.")] = 256,
    timeout_s: Annotated[float, typer.Option(min=1, help="Of one request.")] = 300.0,
    token_file: Annotated[Path | None, typer.Option(help="The tenant's token; default: OPD_TOKEN_FILE.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="PEM file: who may sign the server's certificate.")] = None,
    cert_file: Annotated[Path | None, typer.Option(help="PEM file: our certificate, for mutual TLS.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="PEM file: its key.")] = None,
    trust_network: Annotated[bool, typer.Option(help="The way is private: send the token without TLS.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="File: forget what was scored before.")] = False,
) -> None:
    """Asks a pool about one PROMPT and RESPONSE, token by token, or about every row of a FILE with --out.

    A file's scores are kept in parts; the same command goes on where it was cut off.
    """
    credentials = load_credentials(
        token_file=token_file, ca_file=ca_file, cert_file=cert_file, key_file=key_file, trust_network=trust_network
    )
    if out is None:
        if response is None or tokenizer is None:
            missing = "RESPONSE" if response is None else "--tokenizer"
            raise ConfigError(f"{missing}: is missing; give PROMPT, RESPONSE and --tokenizer, or FILE and --out")
        from services.score_command import score_text

        score_text(
            url=url, teacher=teacher, tenant=tenant, tokenizer=tokenizer, prompt=prompt, response=response,
            top_k=4 if top_k is None else top_k, as_json=as_json, credentials=credentials,
        )  # fmt: skip
        return
    if response is not None:
        raise ConfigError(f"RESPONSE={response!r:.40}: has no meaning with --out; give the FILE alone")
    if overlong not in ("skip", "truncate"):
        raise ConfigError(f"--overlong {overlong}: is neither skip nor truncate; give one of them")
    from services.score_file.command import score_file
    from services.score_file.settings import Overlong, ScoreFileSettings

    settings = ScoreFileSettings(
        source=Path(prompt), target=out, score_top_k=16 if top_k is None else top_k, prompt_column=prompt_column,
        response_column=response_column, candidates_column=candidates_column, batch_invariant=batch_invariant,
        overlong=Overlong(overlong), tokenizer=tokenizer, teacher=teacher, tenant=tenant, timeout_s=timeout_s,
        max_in_flight=max_in_flight, rows_per_part=rows_per_part, overwrite=overwrite,
    )  # fmt: skip
    raise typer.Exit(score_file(settings, url, credentials))
