"""The `philharmonics` command: remix a song, serve, list models and voices, keep API keys.

exit codes   0 done
             2 wrong usage
             3 the server refused the song, the notes or an option
             4 no server answered, or none could be started
             5 the server failed, or its answer could not be written
             6 the server is busy
           130 interrupted
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from client.api import DEFAULT_URL, Busy, Client, PhilharmonicsError, Problem, Refused, Unreachable
from client.export_environment import run_export, run_revocation, run_tuner
from client.local_server import StartFailed, local_server, serve_forever
from client.progress import show_progress

REFUSED, UNREACHABLE, FAILED, BUSY, INTERRUPTED = 3, 4, 5, 6, 130

PASSED_ON = {"ignore_unknown_options": True, "help_option_names": list[str]()}
"""Of a command whose arguments another program reads."""

SCOPES_HELP = "remix, voices, metrics or admin; may be repeated."

server_option = click.option(
    "--server",
    envvar="PHILHARMONICS_SERVER",
    metavar="URL",
    help=f"A running server. Unset: {DEFAULT_URL} if one is there, else one is started for this "
    "call and stopped after it.",
)


key_option = click.option(
    "--key",
    envvar="PHILHARMONICS_API_KEY",
    metavar="KEY",
    help="Your API key, where the server asks for one. Better in the variable: others see what "
    "a command was called with.",
)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of every command that talks to a server."""
    return server_option(key_option(command))


@click.group(epilog="Exit codes: 0 done, 2 usage, 3 refused, 4 no server, 5 failed, 6 busy.")
@click.version_option(package_name="deep-philharmonics")
def main() -> None:
    """A song goes in, a remix comes out."""


@main.command()
@click.argument("song", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--voice", help="Who sings; a name that `philharmonics voices` lists.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for results.")
@click.option("--seed", type=int, help="The same seed gives the same music.")
@click.option("--mode", help="accompany or continue.")
@click.option("--octaves", type=int, help="Transpose the vocal by so many octaves.")
@click.option(
    "--option",
    "-o",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other option of the server's /docs, such as -o temperature=0.8. May be repeated.",
)
@server_options
def remix(
    song: Path,
    out: Path | None,
    settings: tuple[str, ...],
    server: str | None,
    key: str | None,
    **named: Any,
) -> None:
    """Remix SONG: another voice over newly written music.

    Writes remix.wav, stems/, notes.mid, generated.mid, voice.wav, report.json and report.png to
    --out (out/<song's name> if unset).
    """
    options = {name: value for name, value in named.items() if value is not None}
    options |= dict(_setting(setting) for setting in settings)
    folder = out or Path("out") / song.stem
    with _errors(), _server(server, key) as client, show_progress(sys.stderr) as on_progress:
        client.remix(song, folder, options, on_progress=on_progress)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            click.echo(path)


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=3000, show_default=True, help="Port to listen on.")
@click.option(
    "--grpc-port",
    default=3001,
    show_default=True,
    envvar="PHILHARMONICS_GRPC_PORT",
    help="Port to listen on for gRPC; 0 for no gRPC.",
)
def serve(host: str, port: int, grpc_port: int) -> None:
    """Start every stage and the composer on this machine, until interrupted."""
    with _errors():
        sys.exit(serve_forever(host, port, grpc_port))


@main.command()
@server_options
def models(server: str | None, key: str | None) -> None:
    """List the models: stage, licence, weights, whether they are installed."""
    with _errors(), _server(server, key) as client:
        rows = client.models()
    _print(rows, ["name", "stage", "weights", "licence", "installed", "default"])


@main.group(invoke_without_command=True)
@server_options
@click.pass_context
def voices(context: click.Context, server: str | None, key: str | None) -> None:
    """Voices: list those that can sing (as without a command), enrol one, revoke one."""
    if context.invoked_subcommand is None:
        context.invoke(list_voices, server=server, key=key)


@voices.command("list")
@server_options
def list_voices(server: str | None, key: str | None) -> None:
    """List the voices that can sing."""
    with _errors(), _server(server, key) as client:
        rows = client.voices()
    _print(rows, ["name", "model", "weights", "licence", "default"])


@voices.command("add", context_settings=PASSED_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def add_voice(arguments: tuple[str, ...]) -> None:
    """Enrol a voice of this machine's service: NAME --samples DIR|FILES --consent FILE [--steps N].

    Needs the export environment.
    """
    with _errors():
        sys.exit(run_export(list(arguments), "training.enrol"))


@voices.command("remove")
@click.argument("name")
def remove_voice(name: str) -> None:
    """Revoke the voice NAME of this machine's service: delete all of it, and list what went."""
    with _errors():
        sys.exit(run_revocation([name]))


@main.group()
def keys() -> None:
    """API keys of a server that asks for them; with a key of the scope admin.

    The first one is made beside the server: python -m jobs.keys add NAME --scope admin
    """


@keys.command("add")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, metavar="SCOPE", help=SCOPES_HELP)
@click.option("--rate", "rate_per_minute", type=int, help="Requests a minute.")
@click.option("--jobs", "jobs_at_once", type=int, help="Jobs that have not ended.")
@server_options
def add_key(
    name: str, scopes: tuple[str, ...], server: str | None, key: str | None, **quotas: int | None
) -> None:
    """Make a key called NAME and print it: it is shown this once."""
    given = {quota: value for quota, value in quotas.items() if value is not None}
    with _errors(), Client(server or DEFAULT_URL, key) as client:
        click.echo(client.add_key(name, scopes, **given)["key"])


@keys.command("list")
@server_options
def list_keys(server: str | None, key: str | None) -> None:
    """List the keys, the oldest first."""
    with _errors(), Client(server or DEFAULT_URL, key) as client:
        rows = client.keys()
    for row in rows:
        row["scopes"] = " ".join(row["scopes"])
        row["valid"] = row["revoked_s"] is None
    _print(rows, ["id", "name", "scopes", "rate_per_minute", "jobs_at_once", "valid"])


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@server_options
def revoke_key(key_id: str, server: str | None, key: str | None) -> None:
    """Make the key ID invalid, for good."""
    with _errors(), Client(server or DEFAULT_URL, key) as client:
        client.revoke_key(key_id)
    click.echo(f"{key_id} is revoked.")


@main.command(context_settings=PASSED_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def export(arguments: tuple[str, ...]) -> None:
    """Make a served model of a checkpoint, with a report; needs the export environment."""
    with _errors():
        sys.exit(run_export(list(arguments)))


@main.command(context_settings=PASSED_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def tune(arguments: tuple[str, ...]) -> None:
    """Measure which batches are worth making here; --write puts them into models.toml."""
    with _errors():
        sys.exit(run_tuner(list(arguments)))


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE.", param_hint="--option")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@contextmanager
def _server(url: str | None, key: str | None) -> Iterator[Client]:
    """The server at `url`; or the one at the default address; or one for this call."""
    with Client(url or DEFAULT_URL, key) as client:
        if url is not None or client.is_ours():
            yield client
            return
    with (
        local_server(notify=lambda line: click.echo(line, err=True)) as own_url,
        Client(own_url, key) as client,
    ):
        yield client


@contextmanager
def _errors() -> Iterator[None]:
    """Whatever goes wrong ends in a line that says so, and an exit code."""
    try:
        yield
    except (Unreachable, StartFailed) as error:
        _fail(str(error), UNREACHABLE)
    except Problem as error:
        code = {Busy: BUSY, Refused: REFUSED}.get(type(error), FAILED)
        remedy = error.remedy if error.remedy and error.remedy not in error.detail else None
        _fail("\n".join(filter(None, [str(error), remedy])), code)
    except (PhilharmonicsError, OSError) as error:
        _fail(str(error), FAILED)
    except KeyboardInterrupt:
        _fail("Interrupted.", INTERRUPTED)


def _fail(message: str, code: int) -> NoReturn:
    click.secho(message, fg="red", err=True)
    sys.exit(code)


def _print(rows: list[dict[str, Any]], columns: list[str]) -> None:
    if not sys.stdout.isatty():
        click.echo("\t".join(columns))
        for row in rows:
            click.echo("\t".join(_cell(row.get(column)) for column in columns))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
