"""A node's side of the Flower app bundle: it carries messages to the vault that the site runs."""

from fedfuse.federation.forward import make_forwarder

app = make_forwarder()
