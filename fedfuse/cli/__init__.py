"""The command line: `fedfuse simulate`, `fedfuse predict`, `fedfuse explain`, `fedfuse export`,
`fedfuse plan`, `fedfuse data`, `fedfuse models`, `fedfuse check`, `fedfuse node`, `fedfuse server`,
`fedfuse ledger`, `fedfuse report`, `fedfuse doctor`.

Data goes to stdout, messages to stderr. Exit codes: 0 done, 1 unexpected, 2 to 8 the error classes
of `fedfuse.errors`, 130 interrupted. Torch, Flower and numpy are loaded inside the commands, so
that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, NoReturn

import click
import typer

from fedfuse import __version__
from fedfuse.cli import (
    check,
    data,
    doctor,
    explain,
    export,
    ledger,
    models,
    node,
    plan,
    predict,
    report,
    server,
    simulate,
)
from fedfuse.errors import FedfuseError

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="fedfuse",
    help="Private federated training of multimodal fusion models.",
    epilog="Start here: fedfuse simulate --epsilon 8",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        click.echo(f"fedfuse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", is_eager=True, callback=_version
        ),
    ] = False,
) -> None: ...


app.command("simulate")(simulate.simulate)
app.command("predict")(predict.predict)
app.command("explain")(explain.explain)
app.command("export")(export.export)
app.command("plan")(plan.plan)
app.add_typer(data.app, name="data")
app.command("models")(models.models)
app.command("check")(check.check)
app.add_typer(node.app, name="node")
app.add_typer(server.app, name="server")
app.add_typer(ledger.app, name="ledger")
app.add_typer(report.app, name="report")
app.command("doctor")(doctor.doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, print what went wrong if anything did, and return the exit code."""
    try:
        code = app(args=argv, prog_name="fedfuse", standalone_mode=False)
    except FedfuseError as error:
        _debug()
        return _complain(error.where, error.what, error.hint, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "fedfuse"
        return _complain("", error.format_message(), f"see {command} --help", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _complain("", "interrupted", "", 130)
    except Exception as error:
        _debug()
        text = " ".join(str(error).split())
        return _complain(
            "",
            f"unexpected {type(error).__name__}: {text}" if text else type(error).__name__,
            "set FEDFUSE_DEBUG=1 and run again to see where it comes from",
            1,
        )
    return code if isinstance(code, int) else 0


def run() -> NoReturn:
    """The command as a process, which ends as soon as all is said and written.

    What Python takes apart at its end, object by object, is half a second where torch is loaded,
    and is given back to the system anyway.
    """
    code = main()
    alone = all(t.daemon or t is threading.main_thread() for t in threading.enumerate())
    if alone:
        with suppress(Exception):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    raise SystemExit(code)


def _complain(where: str, what: str, hint: str, code: int) -> int:
    click.echo(f"error: {where}: {what}" if where else f"error: {what}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    return code


def _debug() -> None:
    """Raises on the exception that is being handled, where FEDFUSE_DEBUG=1 asks to see it."""
    if os.environ.get("FEDFUSE_DEBUG", "") not in ("", "0"):
        error = sys.exc_info()[1]
        if error is not None:
            raise error
