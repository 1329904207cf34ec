"""The server's side of the Flower app bundle: the site's own fedfuse does the work."""

from fedfuse.federation.server import make_server_app

app = make_server_app()
