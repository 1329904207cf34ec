"""Nodes, messages and aggregation, on Flower: the one part that knows `flwr`."""

import os as _os

# Read by Flower and Ray when they are loaded: nothing of a run goes to anybody else's server.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    _os.environ.setdefault(_name, _value)
