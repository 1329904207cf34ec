"""`fedfuse node`: what a node's operator does, from an empty folder to a node at work."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

if TYPE_CHECKING:
    from fedfuse.federation.inspection import Look
    from fedfuse.federation.vault import Answered, Vault

app = typer.Typer(
    help="Run a real node: its data, its ledger and its rules stay here.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Node = Annotated[Path, typer.Argument(help="The node's folder, or its node.toml.", metavar="NODE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_MARKS = {"ok": "✓", "note": "!", "wrong": "✗"}


@app.command(
    epilog="Example: fedfuse node init clinic --name clinic-a --epsilon 2 --server server.pub "
    "--superlink fl.example.org:9092 --ca ca.pem"
)
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder for the node.", metavar="NODE")],
    name: Annotated[str, typer.Option(help="What servers call the node.")],
    epsilon: Annotated[
        float, typer.Option(help="The most that may ever be spent on the data, by all servers.")
    ],
    server: Annotated[
        list[str],
        typer.Option(
            help="A server that is answered: its public key, or a PEM file; any number. "
            '"any": whoever reaches the node.',
            metavar="KEY",
        ),
    ],
    superlink: Annotated[str, typer.Option(help="The server's Fleet API.", metavar="HOST:PORT")],
    ca: Annotated[
        Path | None,
        typer.Option(help="The certificate that vouches for the server, in PEM.", metavar="FILE"),
    ] = None,
    delta: Annotated[float, typer.Option(help="Of the promise.")] = 1e-6,
    unit: Annotated[str, typer.Option(help="Of the promise.", metavar="UNIT")] = "record",
    anchor: Annotated[
        Path | None,
        typer.Option(
            help="Note the ledger's last line in this file too; put it on another disk.",
            metavar="FILE",
        ),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(
            help="The user that runs the SuperNode, if it is another one, as it should be.",
            metavar="USER",
        ),
    ] = None,
    socket: Annotated[
        Path | None,
        typer.Option(
            help="Where the vault's socket is to lie, if not in the node's folder.",
            metavar="FILE",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no node key: for trials on one machine.")
    ] = False,
) -> None:
    """Make a node: its settings, its ledger, its keys. Prints the key to register at the server."""
    from fedfuse.federation.newnode import Equipment, equip

    line = equip(
        folder,
        Equipment(
            name=name,
            unit=unit,
            max_epsilon=epsilon,
            delta=delta,
            servers=tuple(server),
            address=superlink,
            ca=ca,
            anchor=anchor,
            clients=tuple(client or ()),
            socket=socket,
            insecure=insecure,
        ),
    )
    click.echo(line)
    for note in (
        f"made {folder}: node.toml, the ledger, and the keys; show the keys to nobody",
        f"the line above is {folder / 'supernode.pub'}: the server's operator registers it",
        f"next: fedfuse node prepare {folder} MANIFEST, then fedfuse node check {folder}",
    ):
        click.echo(note, err=True)


@app.command(epilog="Example: fedfuse node prepare clinic records.csv --scenario run.toml")
def prepare(
    node: Node,
    manifest: Annotated[
        Path, typer.Argument(help="The node's records; those of split train.", metavar="MANIFEST")
    ],
    scenario: Annotated[
        Path | None,
        typer.Option(
            help="The run's configuration: its section data says how records are decoded.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Decode the node's records once, so that a round begins at once. The node must not run."""
    from fedfuse.federation.newnode import prepared_store
    from fedfuse.federation.nodefile import node_file

    prepared = prepared_store(node_file(node), manifest, scenario)
    for note in prepared.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{len(prepared.train):,} records of {', '.join(prepared.schema.names)}")


@app.command(epilog="Example: fedfuse node check clinic")
def check(
    node: Node,
    offline: Annotated[bool, typer.Option("--offline", help="Do not knock at the server.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at everything that could be wrong before the node is started, and say how to mend it.

    Exit code 0: nothing is wrong, though there may be notes. 1: something is.
    """
    from fedfuse.federation.inspection import WRONG, inspect
    from fedfuse.federation.nodefile import node_file

    looks = list(inspect(node_file(node), online=not offline))
    if as_json:
        click.echo(json.dumps([asdict(look) for look in looks], indent=2))
    else:
        for line in _check_lines(looks):
            click.echo(line)
    wrong = [look.name for look in looks if look.state == WRONG]
    if wrong:
        click.echo(f"wrong: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)


@app.command(epilog="Example: fedfuse node identity clinic >> peers.toml")
def identity(node: Node) -> None:
    """Print the line by which other nodes know this one where updates leave under masks.

    Give it to them by another way than the server. The key is made if it is not there yet.
    """
    from fedfuse.federation.newnode import own_identity
    from fedfuse.federation.nodefile import NodeFile, node_file

    settings = NodeFile.read(node_file(node))
    line, new = own_identity(settings)
    click.echo(line)
    if new:
        click.echo(f"made {settings.masks.key}; show it to nobody", err=True)


@app.command(epilog="Example: fedfuse node start clinic")
def start(
    node: Node,
    only: Annotated[
        str,
        typer.Option(
            help='"vault": the SuperNode is run by another user (docs/deploy/).',
            click_type=click.Choice(("", "vault")),
            show_default=False,
        ),
    ] = "",
) -> None:
    """Run the node, and show a line for each message: what was asked, answered and spent.

    Ctrl-C ends it in order. A SuperNode that ends is started again, a vault is not.
    """
    from fedfuse.federation.nodefile import node_file

    path = node_file(node)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if only:
            from fedfuse.federation.vault import serve

            serve(path, _show, lambda vault: click.echo(_opened(vault)))
        else:
            from fedfuse.federation.running import run_node

            run_node(path, click.echo)
    except KeyboardInterrupt:
        click.echo("the vault is closed" if only else "the node is stopped", err=True)


@app.command(epilog="Example: fedfuse node status clinic")
def status(node: Node, as_json: AsJson = False) -> None:
    """Say whether the node runs, what it was last asked, and what is spent and left.

    Exit code 0: it runs. 1: it does not.
    """
    from fedfuse.federation.door import is_guarded
    from fedfuse.federation.nodefile import node_file
    from fedfuse.federation.vault import STATUS, Vault

    path = node_file(node)
    vault = Vault(path)
    socket = Path(vault.settings.vault.socket)
    try:
        last = json.loads(socket.with_name(STATUS).read_text())
    except (OSError, ValueError):
        last = None
    running, spent = is_guarded(socket.parent), vault.spent()
    tree: dict[str, Any] = {
        "node": vault.name,
        "running": running,
        "last": last,
        "epsilon": spent,
        "epsilon_allowed": vault.policy.epsilon or None,
        "delta": vault.policy.delta or None,
    }
    if as_json:
        click.echo(json.dumps(tree, indent=2))
    else:
        for line in _status_lines(tree):
            click.echo(line)
    if not running:
        raise typer.Exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check_lines(looks: list[Look]) -> Iterator[str]:
    width = max(len(look.name) for look in looks)
    for look in looks:
        yield f"{_MARKS[look.state]} {look.name:<{width}}  {look.found}"
        if look.remedy:
            yield f"  {'':<{width}}  hint: {look.remedy}"


def _opened(vault: Vault) -> str:
    return f"vault of {vault.name} is open: {_budget(vault.spent(), vault.policy.epsilon)}"


def _show(answered: Answered) -> None:
    """One line of the operator's own terminal."""
    click.echo(_answer_line(asdict(answered)))


def _answer_line(told: dict[str, Any]) -> str:
    asked = "a message that is no request"
    if told.get("stage"):
        asked = f"masks, stage {told['stage']}"
    elif told["rounds"]:
        server = f"server {told['server'][:8]}" if told["server"] else "an unsigned server"
        asked = (
            f"round {told['round']} of {told['rounds']}, {told['steps']} steps, "
            f"run {told['run'][:8]}, {server}"
        )
    answer = told["status"] + (f" ({told['problem']})" if told["problem"] else "")
    spent = _budget(told["epsilon"], told["epsilon_allowed"])
    return f"{told['time']}  {asked}: {answer}, {told['seconds']:.2f} s; {spent}"


def _status_lines(tree: dict[str, Any]) -> Iterator[str]:
    yield f"node   {tree['node']}, {'running' if tree['running'] else 'not running'}"
    yield f"last   {_answer_line(tree['last']) if tree['last'] else 'nothing was asked yet'}"
    yield f"spent  {_budget(tree['epsilon'], tree['epsilon_allowed'])}"


def _budget(spent: float | None, allowed: float | None) -> str:
    from fedfuse.privacy.accounting import shown

    if not allowed or spent is None:
        return "NOT PRIVATE: no figure holds"
    left = math.floor(100 * max(0.0, allowed - spent)) / 100  # never more than there is
    return f"epsilon {shown(spent)} of {allowed:g} spent, {left:.2f} left"
