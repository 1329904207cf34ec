"""A node's side of the Flower app bundle: the site's own fedfuse does the work."""

from fedfuse.federation.client import make_client_app

app = make_client_app()
