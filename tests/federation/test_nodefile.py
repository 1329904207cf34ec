"""node.toml: read strictly, nothing promised by default, the example true."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import RecordDict

from fedfuse.errors import ConfigError, PrivacyError
from fedfuse.federation import nodefile
from fedfuse.federation.nodefile import NodeFile
from fedfuse.federation.packing import record_bytes
from fedfuse.federation.wire import encode
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.spec import Unit

EXAMPLE = Path(nodefile.__file__).with_name("node.example.toml")
KEY = "ab" * 32


def written(folder: Path, **sections: dict[str, Any]) -> Path:
    """A node.toml that is complete, with settings of its sections changed; None leaves one out."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"store": "store"},
        "ledger": {"file": "ledger"},
        "policy": {"max_epsilon": 2.0, "delta": 1e-6, "servers": [KEY]},
    }
    for name, changes in sections.items():
        whole = tree.get(name, {}) | changes
        tree[name] = {key: value for key, value in whole.items() if value is not None}
    path = folder / "node.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


def test_the_example_is_a_node_and_names_every_setting(tmp_path: Path) -> None:
    example = EXAMPLE
    settings = NodeFile.read(example)
    assert (settings.policy.unit, settings.policy.max_epsilon) == ("record", 2.0)
    assert settings.ledger.anchor == "/mnt/other/clinic.anchor"
    assert settings.ledger.file == str(example.parent / "clinic.ledger")
    text = example.read_text()
    for section in ("data", "ledger", "policy", "masks", "vault", "superlink"):
        for name in type(getattr(settings, section)).__dataclass_fields__:
            assert f"{name} = " in text, f"{section}.{name}"
    tree = tomllib.loads(text)
    assert tree["policy"]["min_noise_multiplier"] == settings.policy.min_noise_multiplier


def test_a_policy_is_what_the_file_says(tmp_path: Path) -> None:
    SigningKey.create(tmp_path / "server.pem")
    public = SigningKey.load(tmp_path / "server.pem").public
    path = written(
        tmp_path,
        policy={
            "servers": [KEY, "server.pem"], "tasks": ["classification"], "modalities": ["image"],
            "max_rounds": 5, "max_steps": 50, "max_parameters": 500, "min_noise_multiplier": 1.5,
            "max_sample_rate": 0.5, "max_clip_norm": 2.0, "unit": "subject",
        },
    )  # fmt: skip
    rules = NodeFile.read(path).rules()
    assert (rules.unit, rules.epsilon, rules.delta) == (Unit.SUBJECT, 2.0, 1e-6)
    assert rules.servers == {KEY, public}
    assert (rules.tasks, rules.modalities) == ({"classification"}, {"image"})
    limits = (rules.max_rounds, rules.max_steps, rules.max_parameters, rules.min_noise_multiplier)
    assert limits == (5, 50, 500, 1.5)
    assert (rules.max_sample_rate, rules.max_clip_norm) == (0.5, 2.0)
    assert (rules.noise_seed, rules.outputs) == ("", {"update"})
    assert NodeFile.read(written(tmp_path, policy={"servers": ["any"]})).rules().servers is None


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"policy": {"max_epsilon": None}}, "no promise"),
        ({"policy": {"max_epsilon": 0.0}}, "no promise"),
        ({"policy": {"max_epsilon": float("inf")}}, "no promise"),
        ({"policy": {"delta": None}}, "no promise"),
        ({"policy": {"delta": 1.0}}, "no promise"),
        ({"policy": {"delta": float("nan")}}, "policy.delta = nan"),
        ({"policy": {"servers": None}}, "must name the servers"),
        ({"policy": {"servers": [KEY, "any"]}}, "must name the servers"),
        ({"policy": {"unit": "planet"}}, "policy.unit = 'planet'"),
        ({"policy": {"tasks": ["faces"]}}, "policy.tasks has 'faces'"),
        ({"policy": {"outputs": ["loss"]}}, "policy.outputs has 'loss'"),
        ({"policy": {"max_rounds": -1}}, "max_rounds = -1"),
        ({"policy": {"min_noise_multiplier": float("nan")}}, "min_noise_multiplier = nan"),
        ({"policy": {"max_epsilom": 3.0}}, "unknown setting policy.max_epsilom"),
        ({"policy": {"max_epsilon": "lots"}}, "policy.max_epsilon = 'lots'"),
        ({"ledger": {"file": None}}, "ledger.file is missing"),
        ({"data": {"store": None}}, "data.store is missing"),
        ({"data": {"node": -1}}, "data.node = -1"),
        ({"more": {"x": 1}}, "unknown setting more"),
        ({"policy": {"secure_aggregation": "perhaps"}}, "secure_aggregation = 'perhaps'"),
        (
            {"policy": {"unit": "node", "secure_aggregation": "required"}},
            "masks.peers is missing",
        ),
        ({"policy": {"secure_aggregation": "required"}}, "never leave under masks"),
        ({"masks": {"peers": "peers.toml"}}, "masks.key is missing"),
        ({"masks": {"colluders": -1}}, "masks.colluders = -1"),
        ({"vault": {"max_megabytes": -1}}, "vault.max_megabytes = -1"),
    ],
)
def test_a_file_that_is_wrong_is_refused_and_the_setting_named(
    tmp_path: Path, sections: dict[str, dict[str, Any]], message: str
) -> None:
    path = written(tmp_path, **sections)
    with pytest.raises(ConfigError, match=message) as caught:
        NodeFile.read(path)
    assert caught.value.where == str(path)


def test_the_vault_takes_what_the_policy_allows_unless_it_is_told_less(tmp_path: Path) -> None:
    settings = NodeFile.read(written(tmp_path))
    assert settings.fitting_parameters == settings.policy.max_parameters == 100_000_000
    few = NodeFile.read(written(tmp_path, policy={"max_parameters": 1_000_000}))
    many_small = {f"layer.{n}": np.zeros(200, dtype=np.float32) for n in range(5000)}
    for arrays in (many_small, {"one": np.zeros(1_000_000, dtype=np.float32)}):
        size = record_bytes(RecordDict({"arrays": encode(arrays)}))
        assert 4_000_000 < size <= few.most_bytes < 24_000_000
    tight = NodeFile.read(written(tmp_path, vault={"max_megabytes": 256}))
    assert tight.most_bytes == 256 << 20
    assert tight.fitting_parameters == 60 << 20 < tight.policy.max_parameters
    assert NodeFile.read(written(tmp_path, vault={"max_megabytes": 1})).fitting_parameters == 0


def test_a_node_without_a_promise_says_so_itself(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        policy={"unit": "none", "max_epsilon": None, "delta": None},
        ledger={"file": None},
    )
    assert NodeFile.read(path).rules().unit is Unit.NONE


def test_no_file_no_toml_and_no_key_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        NodeFile.read(tmp_path / "node.toml")
    (tmp_path / "node.toml").write_text("policy = [")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        NodeFile.read(tmp_path / "node.toml")
    path = written(tmp_path, policy={"servers": ["nobody.pub"]})
    with pytest.raises(PrivacyError, match="key cannot be read"):
        NodeFile.read(path).rules()
