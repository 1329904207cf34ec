"""The Flower app bundle that a server hands to its nodes: two small apps, and the run's settings.

It holds no `fedfuse`: each site runs the one that it installed itself. It is the same as what lies
in server/, clients/ and pyproject.toml of the source, which an installed fedfuse does not have.
"""

from __future__ import annotations

from pathlib import Path

import tomli_w

from fedfuse import __version__
from fedfuse.config import RunConfig

__all__ = ["APPS", "write_bundle"]

APPS = {
    "server": '''\
"""The server's side of the Flower app bundle: the site's own fedfuse does the work."""

from fedfuse.federation.server import make_server_app

app = make_server_app()
''',
    "clients": '''\
"""A node's side of the Flower app bundle: it carries messages to the vault that the site runs."""

from fedfuse.federation.forward import make_forwarder

app = make_forwarder()
''',
}
"""By folder: what its app.py says."""


def write_bundle(folder: Path) -> None:
    """Puts the bundle into `folder`, to be submitted with `flwr run`. Raises OSError."""
    for name, text in APPS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(
            '"""The work is done by the `fedfuse` that is installed where it runs."""\n'
        )
        (folder / name / "app.py").write_text(text)
    tree = {
        "project": {"name": "fedfuse", "version": __version__, "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedfuse",
                    "fab-include": [f"/{name}/**/*.py" for name in APPS],
                    "components": {
                        "serverapp": "server.app:app",
                        "clientapp": "clients.app:app",
                    },
                    "config": RunConfig().to_flat(),
                }
            }
        },
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(tree))
