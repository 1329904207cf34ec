"""The Flower client app. The work is done by the `fedfuse` that is installed where it runs."""
