"""`fedfuse server`: what a server's operator does, from an empty folder to a finished run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedfuse.cli.scenario import Flags, configuration
from fedfuse.cli.simulate import draw
from fedfuse.cli.summary import say
from fedfuse.errors import FederationError, RunFolderError, UsageError

if TYPE_CHECKING:
    from fedfuse.federation.deploy import Started
    from fedfuse.federation.serverfile import ServerFile
    from fedfuse.federation.superlink import SuperLink

app = typer.Typer(
    help="Run a real federation: the SuperLink, its nodes, its runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Server = Annotated[Path, typer.Argument(help="The server's folder.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Log = Annotated[
    str,
    typer.Option(help="How to say what happens.", click_type=click.Choice(("text", "json"))),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print the run folder's path and nothing else.")
]
_SOON_DAYS = 30
_START_S = 150.0


@app.command(epilog="Example: fedfuse server init srv --host fl.example.org")
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder for the server.", metavar="DIR")],
    host: Annotated[
        list[str],
        typer.Option(help="What nodes call this server; the first is the one they are told."),
    ],
    port: Annotated[int, typer.Option(help="Where they connect.", min=1, max=65535)] = 9092,
    bind: Annotated[
        str,
        typer.Option(
            help="Where to listen. Another address than this machine's own lets whoever reaches it "
            "start runs: put a proxy before it (docs/deploy/)."
        ),
    ] = "127.0.0.1",
) -> None:
    """Make a server: its settings, its keys, and a certificate signed by its own authority.

    Prints the public key that nodes list under policy.servers.
    """
    from fedfuse.federation.serverfile import equip_server

    server = equip_server(folder, hosts=host, port=port, bind=bind)
    click.echo(server.key().public)
    for note in (
        f"made {folder}: server.toml, keys, certificates; show the keys to nobody",
        f"nodes get {server.authority} and {folder / 'server.pub'}",
        f"next: fedfuse server prepare {folder} MANIFEST, then fedfuse server start {folder}",
    ):
        click.echo(note, err=True)


@app.command(epilog="Example: fedfuse server renew srv")
def renew(folder: Server) -> None:
    """Make a new certificate for the server. Nodes change nothing; the server must start anew."""
    from fedfuse.federation import serverfile

    found = serverfile.renew(serverfile.ServerFile.read(folder))
    click.echo(f"{found.path} holds until {found.ends:%Y-%m-%d}, for {', '.join(found.names)}")


@app.command(epilog="Example: fedfuse server prepare srv public.csv --scenario run.toml")
def prepare(
    folder: Server,
    manifest: Annotated[
        Path,
        typer.Argument(help="Public records, of splits test and valid.", metavar="MANIFEST"),
    ],
    scenario: Annotated[
        Path | None,
        typer.Option(
            help="The run's configuration: its section data says how records are decoded.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Decode the public records on which each round's model is evaluated."""
    from fedfuse.federation.serverdata import prepare_store
    from fedfuse.federation.serverfile import ServerFile

    prepared = prepare_store(ServerFile.read(folder), manifest, scenario)
    for note in prepared.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{len(prepared.test):,} test records of {', '.join(prepared.schema.names)}")


@app.command(epilog="Example: fedfuse server register srv clinic-a.pub --name clinic-a")
def register(
    folder: Server,
    key: Annotated[
        Path | None, typer.Argument(help="A node's supernode.pub.", metavar="[PUBLIC_KEY_FILE]")
    ] = None,
    name: Annotated[
        str, typer.Option(help="What to call the node.  [default: as the key's comment]")
    ] = "",
    remove: Annotated[
        str, typer.Option(help="Let this node connect no more.", metavar="NODE")
    ] = "",
    list_all: Annotated[bool, typer.Option("--list", help="Show who is registered.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a node connect, or no more. Without a key: show who may. The server must be running."""
    link = _link(folder)
    if key is not None and (remove or list_all):
        raise UsageError("a key and --remove or --list", hint="one thing at a time")
    if remove:
        click.echo(f"node {link.unregister(remove)} is removed")
    elif key is not None:
        click.echo(f"node {link.register(key, name)} is registered")
    else:
        nodes = link.nodes()
        click.echo(json.dumps(nodes, indent=2) if as_json else "\n".join(_node_lines(nodes)))


@app.command(epilog="Example: fedfuse server start srv")
def start(
    folder: Server,
    detach: Annotated[
        bool, typer.Option("--detach", help="Come back as soon as it answers.")
    ] = False,
    log: Log = "text",
) -> None:
    """Start the SuperLink, with TLS and nodes' keys checked. Ctrl-C ends it in order."""
    link = _link(folder)
    if detach:
        _detach(link, log)
        return
    signal.signal(signal.SIGTERM, _interrupt)
    from fedfuse.federation.journal import line
    from fedfuse.federation.metrics import serving

    def ready() -> None:
        server = link.server
        if log == "json":
            facts = {"address": server.address, "authority": str(server.authority)}
            click.echo(line("started", **facts, public_key=server.key().public), err=True)
        else:
            click.echo("\n".join(_invitation(server)), err=True)

    def turned_away(text: str) -> None:
        said = line("turned-away", problem=text) if log == "json" else f"turned away: {text}"
        click.echo(said, err=True)

    try:
        with serving(link):
            link.run(ready, turned_away)
    except KeyboardInterrupt:
        pass
    click.echo(line("stopped") if log == "json" else "the server is stopped", err=True)


@app.command(epilog="Example: fedfuse server run srv simulations/vqa.toml --set train.rounds=5")
def run(
    folder: Server,
    scenario: Annotated[
        Path | None, typer.Argument(help="See simulations/.", metavar="[SCENARIO.toml]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any setting, as train.rounds=5; repeatable.", metavar="KEY=VALUE"
        ),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="Go on with a run that was broken off.", metavar="RUN")
    ] = "",
    log: Log = "text",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Start a run on the connected nodes, and follow it. Ctrl-C stops following, not the run.

    Exit codes are those of `fedfuse simulate`.
    """
    from fedfuse.federation.deploy import launch
    from fedfuse.runfolder import fresh_folder

    link = _link(folder)
    runs = link.server.runs
    flags = Flags(scenario=scenario, settings=tuple(settings or ()))
    if resume:
        from fedfuse.runfolder import RunFolder

        if flags.given:
            raise UsageError(f"--resume goes on with the run as it was: no {flags.given[0]}")
        path = runs / Path(resume).name
        config = RunFolder.open(path).config()
    else:
        # nodes get all of it: no path of this machine's
        config = configuration(flags).with_values({"data.manifest": ""})
        path = fresh_folder(config.name, runs)
    started = launch(link, config, path, resume=bool(resume))
    if not quiet:
        click.echo(f"Flower's run {started.flower_run}, in {path}", err=True)
    _follow(link, started, log=log, quiet=quiet, as_json=as_json)


@app.command(epilog="Example: fedfuse server follow srv demo-20250131-101500")
def follow(
    folder: Server,
    run: Annotated[str, typer.Argument(help="As `status` lists it.", metavar="RUN")],
    log: Log = "text",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Follow a run again, from its beginning or its last resume; of one that ended, say how.

    Ctrl-C stops following, not the run. Exit codes are those of `fedfuse simulate`.
    """
    from fedfuse.federation.deploy import attach

    link = _link(folder)
    started = attach(link, link.server.runs / Path(run).name)
    _follow(link, started, log=log, quiet=quiet, as_json=as_json)


@app.command(epilog="Example: fedfuse server status srv --json")
def status(folder: Server, as_json: AsJson = False) -> None:
    """Say whether the server answers, which nodes are connected, and how the runs stand.

    Exit code 0: it answers, and its certificate holds. 1: not so.
    """
    from fedfuse.federation.knocks import failed_handshakes, strangers

    link = _link(folder)
    certificate = link.server.certificate()
    answers = link.answers()
    tree: dict[str, Any] = {
        "address": link.server.address,
        "answers": answers,
        "pid": link.pid,
        "certificate_ends": certificate.ends.isoformat(),
        "certificate_days": round(certificate.days_left, 1),
        "nodes": link.nodes() if answers else [],
        "turned_away": strangers(link.server.log),
        "failed_handshakes": failed_handshakes(link.server.log),
        "runs": list(_runs(link.server)),
    }
    if as_json:
        click.echo(json.dumps(tree, indent=2))
    else:
        for line in _status_lines(tree):
            click.echo(line)
    if not answers or certificate.days_left < 0:
        raise typer.Exit(1)


@app.command(epilog="Example: fedfuse server stop srv --run demo-20250131-101500")
def stop(
    folder: Server,
    run: Annotated[
        str, typer.Option(help="Only this run; it can be gone on with.", metavar="RUN")
    ] = "",
) -> None:
    """Stop the server, with what runs on it; or one run."""
    from fedfuse.federation.tickets import flower_run_of, is_conducted

    link = _link(folder)
    if not run:
        click.echo("the server is stopped" if link.stop() else "the server was not running")
        return
    path = link.server.runs / Path(run).name
    number = flower_run_of(path)
    if number is None:
        raise RunFolderError("no run of this server's", where=str(path))
    link.halt(number)
    _wait(lambda: not is_conducted(path))
    again = f"fedfuse server run {folder} --resume {path.name}"
    click.echo(f"{path.name} is stopped; go on with: {again}")


@app.command(epilog="Example: fedfuse server metrics srv > /var/lib/node_exporter/fedfuse.prom")
def metrics(folder: Server) -> None:
    """Print figures for Prometheus: rounds, nodes, bytes, seconds, failures. Nothing private."""
    from fedfuse.federation.metrics import exposition

    click.echo(exposition(_link(folder)), nl=False)


def _follow(link: SuperLink, started: Started, *, log: str, quiet: bool, as_json: bool) -> None:
    """Shows the run until it ends, and then its outcome. Raises the error that ended it."""
    from fedfuse.cli.progress import progress
    from fedfuse.federation import deploy

    folder, path = link.server.folder, started.run
    try:
        as_lines = log == "json" and not quiet
        with progress(quiet=quiet or as_lines) as view:
            summary = dict(deploy.follow(link, started, view, _say_line if as_lines else None))
    except KeyboardInterrupt:
        click.echo(f"the run goes on; see it: fedfuse server follow {folder} {path.name}", err=True)
        click.echo(f"hint: stop it with: fedfuse server stop {folder} --run {path.name}", err=True)
        raise typer.Exit(130) from None
    finally:
        draw(path)
    say(summary, path, as_json=as_json, quiet=quiet)


def _say_line(text: str) -> None:
    click.echo(text, err=True)


def _link(folder: Path) -> SuperLink:
    from fedfuse.federation.serverfile import ServerFile
    from fedfuse.federation.superlink import SuperLink

    return SuperLink(ServerFile.read(folder))


def _invitation(server: ServerFile) -> list[str]:
    """What is to be given to nodes, and what the operator should know."""
    certificate = server.certificate()
    lines = [
        f"the server answers at {server.local}; log: {server.log}",
        f"give to nodes: the address {server.address}, the file {server.authority}, and the "
        f"public key {server.key().public}",
        f"let a node connect with: fedfuse server register {server.folder} supernode.pub",
    ]
    if certificate.days_left < _SOON_DAYS:
        lines.append(
            f"note: the certificate ends in {certificate.days_left:.0f} days: "
            f"fedfuse server renew {server.folder}"
        )
    if server.settings.superlink.bind not in ("127.0.0.1", "::1", "localhost"):
        lines.append(
            f"note: it listens at {server.settings.superlink.bind}: whoever reaches that port can "
            "start runs, not only nodes; see docs/deploy/network.md"
        )
    return lines


def _detach(link: SuperLink, log: str) -> None:
    """Starts the server in the background. Raises FederationError where it does not come up."""
    link.check()
    folder = link.server.folder
    out = folder / "server.log"
    out.touch(mode=0o600)
    with out.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedfuse", "server", "start", str(folder), "--log", log],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + _START_S
    while not (link.pid and link.answers()):
        if child.poll() is not None or time.monotonic() > end:
            raise FederationError("the server did not start", where=str(out), hint="see its end")
        time.sleep(0.2)
    for text in _invitation(link.server):
        click.echo(text, err=True)


def _wait(done: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise FederationError(f"the run's server app is still there after {seconds:g} s")
        time.sleep(0.5)


def _runs(server: ServerFile) -> Iterator[dict[str, Any]]:
    from fedfuse.federation.tickets import is_conducted
    from fedfuse.runfolder import RunFolder

    for path in sorted(server.runs.glob("*/config.toml")):
        folder = RunFolder(path.parent)
        with suppress(RunFolderError):
            summary = folder.summary() or {}
            state = "running" if is_conducted(path.parent) else summary.get("status", "broken off")
            yield {
                "run": path.parent.name,
                "status": state,
                "rounds_done": len(folder.metrics()),
                "rounds": folder.config().train.rounds,
            }


def _node_lines(nodes: list[dict[str, str]]) -> Iterator[str]:
    width = max((len(node["name"]) for node in nodes), default=0)
    for node in nodes:
        yield f"{node['name']:<{width}}  {node['status']:<10}  {node['id']}"
    if not nodes:
        yield "no node is registered"


def _status_lines(tree: dict[str, Any]) -> Iterator[str]:
    yield f"server       {tree['address']}, {'answers' if tree['answers'] else 'does not answer'}"
    days = tree["certificate_days"]
    ends = tree["certificate_ends"][:10]
    yield f"certificate  {f'ends {ends}, in {days:.0f} days' if days > 0 else f'ran out on {ends}'}"
    if tree["answers"]:
        for index, text in enumerate(_node_lines(tree["nodes"])):
            yield f"{'nodes' if not index else '':<11}  {text}"
    for key, count in tree["turned_away"].items():
        yield f"turned away  a key that is not registered, {count} x: {key}"
    for text, last in tree["failed_handshakes"].items():
        yield f"turned away  {text}, last told at {last}"
    for index, run in enumerate(tree["runs"]):
        text = f"{run['run']}  {run['status']}, {run['rounds_done']} of {run['rounds']} rounds"
        yield f"{'runs' if not index else '':<11}  {text}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
