"""A run's whole configuration: TOML <-> typed sections <-> Flower's flat run config.

Torch-free. Every field is public: the server, every node and every reader of the report knows it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import tomli_w

from fedfuse.data.spec import AUDIO_FEATURES, DEMOS, PARTITIONS, DataConfig
from fedfuse.errors import ConfigError
from fedfuse.models.spec import (
    ABSENT,
    CLASS_WEIGHTS,
    ENCODERS,
    FUSIONS,
    LOSSES,
    PRETRAINED_KINDS,
    TUNINGS,
    ModelConfig,
)
from fedfuse.privacy.spec import CLIPPINGS, PrivacyConfig, Unit

__all__ = [
    "COMPRESSIONS",
    "ENGINES",
    "STRATEGIES",
    "FederationConfig",
    "RunConfig",
    "TrainConfig",
    "toml",
    "typed",
]

T = TypeVar("T")

ENGINES = ("loopback", "ray")
STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox", "trimmed-mean", "median")
COMPRESSIONS = ("none", "fp16", "bf16", "int8", "topk")
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What a node does in a round, and how many rounds there are."""

    rounds: int = 40
    local_steps: int = 0
    """Optimizer steps that a node takes in a round, the same for every node.
    0: 4 where the run is private, else 12."""
    batch_size: int = 32
    """Records in a step where unit = "none" or "node"; another private step has q x
    declared_records (or declared_subjects) expected."""
    optimizer: str = "sgd"
    learning_rate: float = 0.0
    """0: 0.5 where the run is private (a step's sum is clipped and divided by a public size),
    else 0.05; a tenth of that with adam."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    """Added to each gradient times the weight; with adam it shrinks weights beside the step
    (AdamW). It looks at no record."""
    schedule: str = "cosine"
    """How the learning rate goes over the rounds: one of SCHEDULES."""
    physical_batch: int = 256
    """The most records that pass through the model at once; larger steps are accumulated."""
    device: str = "auto"
    """"auto" takes a GPU where there is one; or "cpu", "cuda", "cuda:1"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationConfig:
    """How updates become one model, and what runs the nodes."""

    strategy: str = "fedavg"
    server_learning_rate: float = 0.0
    """Of fedavgm; for fedadam and fedyogi it is eta. 0: 1 for fedavgm, 0.01 for the others."""
    server_momentum: float = 0.9
    """Of fedavgm; beta_1 of fedadam and fedyogi."""
    tau: float = 1e-3
    """The adaptivity constant of fedadam and fedyogi."""
    proximal_mu: float = 0.01
    """Of fedprox."""
    trim: float = 0.2
    """The share that trimmed-mean cuts off at each end."""
    weighting: str = "equal"
    """"equal", or "examples" (only with unit "none": a count is a release)."""
    fraction: float = 1.0
    """Share of the nodes that train in a round."""
    min_nodes: int = 1
    """A round with fewer good updates than this fails the run."""
    compression: str = "none"
    """What a node's update travels as: one of COMPRESSIONS, see federation/compression.py. It comes
    after the noise, so it takes nothing from the guarantee."""
    compression_keep: float = 0.1
    """The share of an update that "topk" keeps."""
    secure_aggregation: bool = False
    """Simulations with unit "node" or "none": updates travel under masks that cancel in the sum, so
    that the server sees sums alone, see federation/masking. With unit "none" longer updates are cut
    to privacy.clip_norm."""
    round_timeout_s: float = 3600.0
    at_a_time: int = 0
    """Real nodes: how many train at the same time, within the round's time; 0: all. It keeps a
    server that has little to work with from being asked by all of them at once."""
    engine: str = "loopback"
    workers: int = 0
    """Worker processes of the loopback engine. 0: one for each core, or for each GPU."""
    together: int = 0
    """How many nodes a worker trains as one program (see stacked.py). 0: as many as pay, from the
    sizes of model and batch; 1: one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that defines a run, and so everything needed to run it again."""

    name: str = "run"
    seed: int = 0
    """Of the model's first weights, the partition and data order; never of privacy noise."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def private(self) -> bool:
        """Whether the run promises anything at all."""
        return self.privacy.unit != Unit.NONE

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], *, where: str = "config") -> RunConfig:
        """The configuration that nested tables describe.

        Raises ConfigError on an unknown key or a value of the wrong type, naming it.
        """
        return typed(cls, tree, where=where)

    @classmethod
    def from_toml(cls, path: Path) -> RunConfig:
        """The configuration in a TOML file. Raises ConfigError."""
        tree = toml(path, missing="see simulations/ for scenarios to start from")
        return cls.from_dict(tree, where=str(path))

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> RunConfig:
        """The configuration in Flower's run config: scalars under dotted keys, lists as "a,b"."""
        tree: dict[str, Any] = {}
        for key, value in flat.items():
            _put(tree, key, value)
        return cls.from_dict(tree, where="run config")

    def with_defaults(self) -> RunConfig:
        """A copy in which settings that depend on others are filled in; it looks at no data.

        >>> RunConfig().with_defaults().train.local_steps
        4
        """
        train = self.train
        noisy_steps = self.privacy.unit in (Unit.RECORD, Unit.SUBJECT)
        rate = (0.5 if noisy_steps else 0.05) / (10 if train.optimizer == "adam" else 1)
        train = replace(
            train,
            local_steps=train.local_steps or (4 if noisy_steps else 12),
            learning_rate=train.learning_rate or rate,
        )
        return replace(self, train=train)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return asdict(self)

    def to_toml(self) -> str:
        """The whole configuration as TOML, each field written out.

        >>> config = RunConfig(seed=3)
        >>> RunConfig.from_dict(tomllib.loads(config.to_toml())) == config
        True
        """
        return tomli_w.dumps(self.to_dict())

    def to_flat(self) -> dict[str, str | int | float | bool]:
        """Scalars under dotted keys, as Flower's run config takes them.

        >>> RunConfig.from_flat(RunConfig().to_flat()) == RunConfig()
        True
        """
        return dict(_flatten(self.to_dict(), ""))

    def with_values(self, changes: Mapping[str, Any], *, where: str = "--set") -> RunConfig:
        """A copy with dotted keys changed; values may be text, as a command line gives them.

        >>> RunConfig().with_values({"train.rounds": "3"}).train.rounds
        3
        """
        tree = self.to_dict()
        for key, value in changes.items():
            _put(tree, key, value)
        return typed(type(self), tree, where=where)


def toml(path: Path, *, missing: str) -> dict[str, Any]:
    """The tables in a TOML file. Raises ConfigError; `missing` is the hint where there is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), hint=missing) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f"cannot be read as TOML: {error}", where=str(path), hint="mend the line it names"
        ) from None


def typed(cls: type[T], tree: Mapping[str, Any], *, where: str) -> T:
    """An instance of the dataclass `cls` from nested plain values, as TOML gives them.

    Raises ConfigError on an unknown key or a value of the wrong type, naming it and `where`.
    """
    return cast("T", _build(cls, tree, where, ""))


def _build(cls: type[Any], tree: Mapping[str, Any], where: str, prefix: str) -> Any:
    """As `typed`; `prefix` is the section's name and a dot."""
    types = get_type_hints(cls)
    unknown = sorted(set(tree) - set(types))
    if unknown:
        known = ", ".join(sorted(types))
        raise ConfigError(
            f"unknown setting {prefix}{unknown[0]}", where=where, hint=f"the settings here: {known}"
        )
    values = {
        key: _convert(types[key], value, where, f"{prefix}{key}") for key, value in tree.items()
    }
    return cls(**values)


def _convert(kind: Any, value: Any, where: str, key: str) -> Any:
    """`value` as `kind`; text is parsed, as it comes from a command line."""
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} = {value!r}, but it is a section", where=where)
        return _build(cast("type[Any]", kind), value, where, f"{key}.")
    if kind == tuple[str, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return tuple(value)
    elif kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
    elif kind is str:
        if isinstance(value, str):
            return value
    elif not isinstance(value, bool):
        try:
            number = kind(value)
            if isinstance(value, str) or number == value:
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    name = "a list of names" if kind == tuple[str, ...] else kind.__name__
    raise ConfigError(f"{key} = {value!r}, but it must be {name}", where=where)


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"unknown setting {dotted}", where="--set")
    tree[last] = value


def _flatten(
    tree: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str | int | float | bool]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ",".join(value) if isinstance(value, tuple) else value


def _check(config: RunConfig) -> None:
    """Raises ConfigError on the first value out of its range."""
    data, model, train = config.data, config.model, config.train
    privacy, federation = config.privacy, config.federation
    for key, text, allowed in (
        ("data.demo", data.demo, DEMOS),
        ("data.partition", data.partition, PARTITIONS),
        ("data.audio_features", data.audio_features, AUDIO_FEATURES),
        ("model.fusion", model.fusion, FUSIONS),
        *(
            (f"model.encoder.{kind}", getattr(model.encoder, kind), names)
            for kind, names in ENCODERS.items()
            if not model.encoder.pretrained(kind)
        ),
        ("model.encoder.tuning", model.encoder.tuning, TUNINGS),
        ("model.absent", model.absent, ABSENT),
        ("model.loss", model.loss, LOSSES),
        ("model.class_weights", model.class_weights, CLASS_WEIGHTS),
        ("train.optimizer", train.optimizer, OPTIMIZERS),
        ("train.schedule", train.schedule, SCHEDULES),
        ("privacy.unit", privacy.unit, tuple(unit.value for unit in Unit)),
        ("privacy.clipping", privacy.clipping, CLIPPINGS),
        ("privacy.noise_by", privacy.noise_by, ("nodes", "server")),
        ("federation.strategy", federation.strategy, STRATEGIES),
        ("federation.weighting", federation.weighting, ("equal", "examples")),
        ("federation.compression", federation.compression, COMPRESSIONS),
        ("federation.engine", federation.engine, ENGINES),
    ):
        if text not in allowed:
            raise ConfigError(f"{key} = {text!r}, but it must be one of {', '.join(allowed)}")
    for key, number, low, high in (
        ("data.nodes", data.nodes, 0, 1_000_000),
        ("data.alpha", data.alpha, 1e-6, 1e6),
        ("data.modality_keep", data.modality_keep, 0.01, 1),
        ("data.image_size", data.image_size, 0, 4096),
        ("data.sample_rate", data.sample_rate, 0, 768_000),
        ("data.audio_seconds", data.audio_seconds, 0, 600),
        ("data.mel_bands", data.mel_bands, 4, 512),
        ("data.mfcc", data.mfcc, 1, data.mel_bands if data.audio_features == "mfcc" else 512),
        ("data.mel_frames", data.mel_frames, 0, 100_000),
        ("data.video_frames", data.video_frames, 1, 1024),
        ("data.video_size", data.video_size, 0, 4096),
        ("data.text_tokens", data.text_tokens, 1, 8192),
        ("data.vocabulary", data.vocabulary, 2, 10_000_000),
        ("data.series_steps", data.series_steps, 0, 1_000_000),
        ("model.dim", model.dim, 1, 65536),
        ("model.fusion_layers", model.fusion_layers, 1, 64),
        ("model.fusion_heads", model.fusion_heads, 1, 64),
        ("model.fusion_width", model.fusion_width, 0, 65536),
        ("model.fusion_rank", model.fusion_rank, 1, 1024),
        ("model.fusion_tokens", model.fusion_tokens, 1, 1024),
        ("model.modality_dropout", model.modality_dropout, 0, 0.95),
        ("model.time_shift", model.time_shift, 0, 0.5),
        ("model.image_shift", model.image_shift, 0, 0.5),
        *(
            (f"model.auxiliary.{name}", weight, 0, 1e3)
            for name, weight in asdict(model.auxiliary).items()
        ),
        ("model.focal_gamma", model.focal_gamma, 0, 16),
        ("model.head_width", model.head_width, 0, 65536),
        ("model.encoder.lora_rank", model.encoder.lora_rank, 1, 1024),
        ("model.encoder.lora_alpha", model.encoder.lora_alpha, 1e-6, 1e6),
        ("model.image_width", model.image_width, 1, 4096),
        ("model.image_depth", model.image_depth, 1, 8),
        ("model.image_terms", model.image_terms, 0, 512),
        ("model.audio_terms", model.audio_terms, 0, 512),
        ("model.audio_width", model.audio_width, 1, 4096),
        ("model.audio_depth", model.audio_depth, 1, 8),
        ("model.video_width", model.video_width, 1, 4096),
        ("model.video_depth", model.video_depth, 1, 8),
        ("model.video_terms", model.video_terms, 0, 512),
        ("model.series_width", model.series_width, 1, 4096),
        ("model.series_depth", model.series_depth, 1, 8),
        ("model.steps_width", model.steps_width, 1, 4096),
        ("model.steps_layers", model.steps_layers, 1, 64),
        ("model.steps_heads", model.steps_heads, 1, 64),
        ("model.vector_width", model.vector_width, 1, 65536),
        ("model.text_width", model.text_width, 1, 65536),
        ("model.text_layers", model.text_layers, 1, 64),
        ("model.text_heads", model.text_heads, 1, 64),
        ("train.rounds", train.rounds, 1, 1_000_000),
        ("train.local_steps", train.local_steps, 0, 1_000_000),
        ("train.batch_size", train.batch_size, 1, 1_000_000),
        ("train.learning_rate", train.learning_rate, 0, 1e6),
        ("train.momentum", train.momentum, 0, 0.9999),
        ("train.weight_decay", train.weight_decay, 0, 1),
        ("train.physical_batch", train.physical_batch, 1, 1_000_000),
        ("privacy.epsilon", privacy.epsilon, 1e-3, 1e3),
        ("privacy.delta", privacy.delta, 1e-30, 0.1),
        ("privacy.clip_norm", privacy.clip_norm, 1e-9, 1e9),
        ("privacy.clip_quantile", privacy.clip_quantile, 0.01, 0.99),
        ("privacy.clip_rate", privacy.clip_rate, 1e-6, 2),
        ("privacy.count_noise", privacy.count_noise, 0, 1e9),
        ("privacy.sample_rate", privacy.sample_rate, 1e-9, 1),
        ("privacy.noise_multiplier", privacy.noise_multiplier, 0, 1e6),
        ("privacy.declared_records", privacy.declared_records, 0, 10**12),
        ("privacy.declared_subjects", privacy.declared_subjects, 0, 10**12),
        ("privacy.records_per_subject", privacy.records_per_subject, 1, 1_000_000),
        ("privacy.noise_nodes", privacy.noise_nodes, 1, 1_000_000),
        ("federation.server_learning_rate", federation.server_learning_rate, 0, 1e6),
        ("federation.server_momentum", federation.server_momentum, 0, 0.9999),
        ("federation.tau", federation.tau, 1e-12, 1e3),
        ("federation.proximal_mu", federation.proximal_mu, 0, 1e6),
        ("federation.trim", federation.trim, 0, 0.499),
        ("federation.fraction", federation.fraction, 1e-6, 1),
        ("federation.compression_keep", federation.compression_keep, 1e-6, 1),
        ("federation.min_nodes", federation.min_nodes, 1, 1_000_000),
        ("federation.round_timeout_s", federation.round_timeout_s, 0.1, 1e7),
        ("federation.together", federation.together, 0, 64),
        ("federation.workers", federation.workers, 0, 1024),
        ("federation.at_a_time", federation.at_a_time, 0, 100_000),
    ):
        if not low <= number <= high:
            raise ConfigError(f"{key} = {number}, but it must be from {low:g} to {high:g}")
    encoder = model.encoder
    attends = "transformer" in (encoder.audio, encoder.video, encoder.series)
    for key, width, heads in (
        (
            "model.text_width",
            model.text_width,
            model.text_heads if encoder.text == "transformer" else 1,
        ),
        ("model.steps_width", model.steps_width, model.steps_heads if attends else 1),
    ):
        if width % heads:
            raise ConfigError(f"{key} = {width}, but it must be a multiple of its {heads} heads")
    _check_pretrained(config)
    if (model.fusion == "graph") != bool(model.knowledge):
        raise ConfigError(
            f"model.fusion = {model.fusion!r}, but model.knowledge = {model.knowledge!r}",
            hint='fusion = "graph" needs a file of triples, and nothing else uses one',
        )
    if model.knowledge and not re.fullmatch(r"[0-9a-fA-F]{64}", model.knowledge_sha256):
        raise ConfigError(
            f"model.knowledge_sha256 = {model.knowledge_sha256!r}, but it must be the SHA-256 of "
            "model.knowledge, so that all sites have the same graph",
            hint=f"sha256sum {model.knowledge} tells it",
        )
    if model.fusion == "early" and model.absent != "zero":
        raise ConfigError(
            f'model.absent = {model.absent!r}, but model.fusion = "early" has no tokens',
            hint='set model.absent = "zero"',
        )
    if model.fusion == "early" and model.auxiliary.any:
        raise ConfigError(
            'model.auxiliary is about tokens, but model.fusion = "early" has none',
            hint="take another operator, or leave the section out",
        )
    if config.private and model.auxiliary.couples:
        name = "contrast" if model.auxiliary.contrast else "correlation"
        raise ConfigError(
            f"model.auxiliary.{name} couples the records of a batch: one record's gradient depends "
            "on others, so clipping it bounds nothing",
            hint="take model.auxiliary.anchors or alignment, which look at one record alone; or "
            'privacy.unit = "none" and no promise',
        )
    if config.private and federation.weighting == "examples":
        raise ConfigError(
            'federation.weighting = "examples", but a count of records is a release',
            hint='take "equal", or privacy.unit = "none" and no promise',
        )
    if privacy.adaptive_clip and privacy.clip_shares:
        raise ConfigError(
            "privacy.adaptive_clip and privacy.clip_shares exclude each other",
            hint="C adapts as a whole, or is shared out",
        )
    if privacy.unit == Unit.NODE:
        _check_node_unit(config)
    if federation.secure_aggregation:
        _check_secure_aggregation(config)


def _check_secure_aggregation(config: RunConfig) -> None:
    privacy, federation = config.privacy, config.federation
    for wrong, what, hint in (
        (
            privacy.unit not in (Unit.NODE, Unit.NONE),
            f'privacy.unit = "{privacy.unit}": its updates carry all their noise by themselves',
            'take unit "node", or leave it out',
        ),
        (
            privacy.unit == Unit.NODE and privacy.noise_by == "server",
            'privacy.noise_by = "server": it cannot clip what it does not see',
            'take privacy.noise_by = "nodes"',
        ),
        (
            privacy.adaptive_clip,
            "privacy.adaptive_clip: a node's count would travel without a mask",
            "set privacy.adaptive_clip = false",
        ),
        (
            federation.strategy != "fedavg",
            f'federation.strategy = "{federation.strategy}"',
            'take "fedavg"',
        ),
        (
            federation.weighting != "equal",
            f'federation.weighting = "{federation.weighting}": a sum of updates has no weights',
            'take "equal"',
        ),
        (
            federation.compression != "none",
            f'federation.compression = "{federation.compression}": masks leave nothing to compress',
            'take "none"',
        ),
        (
            federation.engine != "loopback",
            f'federation.engine = "{federation.engine}"',
            'take "loopback"',
        ),
    ):
        if wrong:
            raise ConfigError(f"federation.secure_aggregation does not go with {what}", hint=hint)


def _check_pretrained(config: RunConfig) -> None:
    encoder = config.model.encoder
    pretrained = [kind for kind in PRETRAINED_KINDS if encoder.pretrained(kind)]
    for kind in pretrained:
        digest = getattr(encoder, f"{kind}_sha256")
        if digest and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ConfigError(
                f"model.encoder.{kind}_sha256 = {digest!r}, but it must be a SHA-256",
                hint="`fedfuse check` tells that of the weights",
            )
    if pretrained and config.model.fusion == "early":
        raise ConfigError(
            f'model.encoder.{pretrained[0]} is pretrained, but model.fusion = "early" has no '
            "encoders",
            hint="take another fusion",
        )
    if config.data.audio_features == "wave" and "audio" not in pretrained:
        raise ConfigError(
            'data.audio_features = "wave", which only pretrained audio encoders take',
            hint='set model.encoder.audio = "hf:...", or data.audio_features = "mel"',
        )


def _check_node_unit(config: RunConfig) -> None:
    privacy, federation = config.privacy, config.federation
    if federation.strategy in ("trimmed-mean", "median"):
        raise ConfigError(
            f'federation.strategy = {federation.strategy!r}, but unit "node" needs a clipped sum, '
            "and a strategy that goes on from its mean",
            hint="take fedavg, fedprox, fedavgm, fedadam or fedyogi",
        )
    if federation.compression != "none" and privacy.noise_by == "nodes":
        raise ConfigError(
            f'federation.compression = {federation.compression!r}, but with unit "node" and noise '
            "by nodes the model's epsilon rests on the noise of a plain sum of updates",
            hint='take compression = "none", or privacy.noise_by = "server"',
        )
    if privacy.noise_nodes > federation.min_nodes:
        raise ConfigError(
            f"privacy.noise_nodes = {privacy.noise_nodes}, but a round goes on with "
            f"federation.min_nodes = {federation.min_nodes} updates, too little noise",
            hint="raise federation.min_nodes",
        )
    if privacy.clip_shares:
        raise ConfigError('privacy.clip_shares is for the units "record" and "subject"')
