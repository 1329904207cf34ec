"""What a command line asks for: a scenario file, changed by flags, as one checked `RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError, UsageError

__all__ = ["Flags", "configuration"]

NO_PROMISE = ("0", "0.0", "none", "inf", "infinity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The flags of `fedfuse simulate` that change the configuration; None: not given."""

    scenario: Path | None = None
    data: Path | None = None
    nodes: int | None = None
    rounds: int | None = None
    epsilon: str | None = None
    unit: str | None = None
    engine: str | None = None
    seed: int | None = None
    modalities: str | None = None
    skip_bad: bool = False
    settings: tuple[str, ...] = field(default=())
    """Each "a.b=c"."""

    @property
    def given(self) -> tuple[str, ...]:
        """The flags that were given, as they are written."""
        names = {"settings": "set", "scenario": "SCENARIO.toml"}
        return tuple(
            name if name.isupper() or "." in name else f"--{name.replace('_', '-')}"
            for name in (
                names.get(each, each)
                for each in self.__dataclass_fields__
                if getattr(self, each) not in (None, False, ())
            )
        )


def configuration(flags: Flags) -> RunConfig:
    """The run that the flags describe.

    The scenario's own paths are relative to the scenario file, those of flags to the working
    directory. A flag of its own beats `--set`, and both beat the scenario.

    Raises UsageError on a flag that makes no sense, ConfigError on a setting that does not.
    """
    config = _scenario(flags.scenario) if flags.scenario else RunConfig()
    settings = dict(_setting(text) for text in flags.settings)
    if settings.get("data.manifest"):
        settings["data.manifest"] = str(Path(settings["data.manifest"]).absolute())
    try:
        config = config.with_values(settings)
        config = config.with_values(_changes(flags, config), where="flags")
    except ConfigError as error:
        raise ConfigError(error.what, where=error.where or _where(flags), hint=error.hint) from None
    return config.with_values({"name": _name(flags, config)})


def _scenario(path: Path) -> RunConfig:
    try:
        config = RunConfig.from_toml(path)
    except ConfigError as error:
        raise ConfigError(error.what, where=error.where or str(path), hint=error.hint) from None
    if not config.data.manifest:
        return config
    return config.with_values({"data.manifest": str(path.absolute().parent / config.data.manifest)})


def _changes(flags: Flags, config: RunConfig) -> dict[str, str | int]:
    changes: dict[str, str | int | None] = {
        "data.manifest": str(flags.data.absolute()) if flags.data else None,
        "data.nodes": flags.nodes,
        "data.modalities": flags.modalities,
        "data.skip_bad": "true" if flags.skip_bad else None,
        "train.rounds": flags.rounds,
        "privacy.epsilon": _epsilon(flags, config),
        "privacy.unit": flags.unit,
        "federation.engine": flags.engine,
        "seed": flags.seed,
    }
    return {key: value for key, value in changes.items() if value is not None}


def _epsilon(flags: Flags, config: RunConfig) -> str | None:
    text = flags.epsilon
    if text is None:
        return None
    if text.strip().lower() in NO_PROMISE:
        raise UsageError(
            f"--epsilon {text} promises nothing that can be kept",
            hint="for a run without privacy say so: --unit none",
        )
    try:
        float(text)
    except ValueError:
        raise UsageError(
            f"--epsilon {text}, but it must be a number above 0", hint="for example: --epsilon 8"
        ) from None
    if (flags.unit or config.privacy.unit) == "none":
        raise UsageError(
            f"--epsilon {text} with unit none: nothing is protected, so there is no epsilon",
            hint="take --unit record, or leave --epsilon out",
        )
    return text


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(
            f"--set {text}, but it must be KEY=VALUE", hint="for example: --set train.rounds=5"
        )
    return key.strip(), value.strip()


def _name(flags: Flags, config: RunConfig) -> str:
    """The run's name; one that nobody chose is taken from the scenario or the data."""
    if config.name != RunConfig().name:
        return config.name
    if flags.scenario:
        return flags.scenario.stem
    return Path(config.data.manifest).parent.name or "run" if config.data.manifest else "demo"


def _where(flags: Flags) -> str:
    return str(flags.scenario) if flags.scenario else ""
