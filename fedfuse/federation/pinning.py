"""Pretrained encoders in a configuration: what follows from their files, written out in it.

All sites must start from the same weights and prepare records the same way, so a run's
configuration says both: the digest of the weights, and the sizes that the networks want.
"""

from __future__ import annotations

from typing import Any

from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError
from fedfuse.models.spec import PRETRAINED, PRETRAINED_KINDS

__all__ = ["check_pinned", "declaration", "pin"]


def pin(config: RunConfig) -> RunConfig:
    """`config` with what it leaves open about its pretrained encoders taken from their files,
    which are fetched from the hub where they are not on this machine.

    Raises DataError where there are no such weights, ModelError where they encode something else.
    """
    kinds = [kind for kind in PRETRAINED_KINDS if config.model.encoder.pretrained(kind)]
    if not kinds:
        return config
    from fedfuse.models.pretrained import find

    changes: dict[str, Any] = {}
    for kind in kinds:
        name = str(getattr(config.model.encoder, kind))
        key = f"model.encoder.{kind}_sha256"
        weights = find(name, getattr(config.model.encoder, f"{kind}_sha256"), download=True)
        settings = weights.settings_for(kind)
        changes[key] = weights.sha256
        if kind == "text" and not config.data.tokenizer:
            changes["data.tokenizer"] = name.removeprefix(PRETRAINED)
            changes["data.vocabulary"] = settings["vocab_size"] + 1
        if kind == "image" and not config.data.image_size:
            changes["data.image_size"] = settings["image_size"]
        if kind == "audio":
            changes["data.audio_features"] = "wave"
            rate = weights.preprocessor.get("sampling_rate", 16_000)
            if config.data.sample_rate not in (0, rate):
                raise ConfigError(
                    f"data.sample_rate = {config.data.sample_rate}, but {name} was trained on "
                    f"{rate} samples a second",
                    hint=f"set data.sample_rate = {rate}, or leave it at 0",
                )
            changes["data.sample_rate"] = rate
    return config.with_values(changes, where="model.encoder")


def check_pinned(config: RunConfig) -> None:
    """Raises ConfigError where a pretrained encoder has no digest: real nodes go by the announced
    configuration, and take no weights that it does not pin down."""
    for kind in PRETRAINED_KINDS:
        encoder = config.model.encoder
        if encoder.pretrained(kind) and not getattr(encoder, f"{kind}_sha256"):
            raise ConfigError(
                f"model.encoder.{kind} is pretrained, but model.encoder.{kind}_sha256 is empty",
                hint="`fedfuse check SCENARIO.toml` tells all that must be written there",
            )


def declaration(config: RunConfig) -> tuple[str, ...]:
    """What a promise takes as given about each pretrained encoder."""
    encoder = config.model.encoder
    return tuple(
        f"it starts from public weights {getattr(encoder, kind)} ({kind}, {encoder.tuning}, "
        f"SHA-256 {getattr(encoder, f'{kind}_sha256')}); what those were trained on is outside "
        "this promise"
        for kind in PRETRAINED_KINDS
        if encoder.pretrained(kind)
    )
