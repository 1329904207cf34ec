"""Public weights by transformers: found, told apart by a digest, and loaded without running code.

A setting "hf:NAME" names a folder that `save_pretrained` wrote, or a hub id, "hf:NAME@REVISION" one
commit of it. All sites must start from the same weights, so the run's configuration holds a digest
of them: it is compared before anything in the files is looked at. Nothing is downloaded but where
`find` is asked to; a node never does, it takes what lies in its own cache.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedfuse.errors import DataError, ModelError
from fedfuse.models.spec import PRETRAINED
from fedfuse.torchaudio_compat import load_torchaudio

__all__ = ["ARCHITECTURES", "Weights", "find", "load"]

ARCHITECTURES = {
    "text": ("bert", "roberta", "distilbert", "clip", "clip_text_model"),
    "image": ("vit", "clip", "clip_vision_model"),
    "audio": ("wav2vec2", "audio-spectrogram-transformer", "whisper"),
}
"""The `model_type` of what can encode each kind; of clip its tower, of whisper its encoder."""

_PARTS = {"clip": {"text": "text_config", "image": "vision_config"}}
_FILES = ["config.json", "preprocessor_config.json", "model.safetensors", "model-*.safetensors",
          "model.safetensors.index.json"]  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Files of weights, as they lie on this machine."""

    name: str
    """As the setting has it, without "hf:"."""
    folder: Path
    sha256: str
    """Over names, sizes and contents of config.json, preprocessor_config.json and the weights."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is in config.json. Raises DataError."""
        return _json(self.folder / "config.json")

    @property
    def preprocessor(self) -> dict[str, Any]:
        """What is in preprocessor_config.json; nothing where there is none. Raises DataError."""
        path = self.folder / "preprocessor_config.json"
        return _json(path) if path.is_file() else {}

    def settings_for(self, kind: str) -> dict[str, Any]:
        """The settings of the part that encodes `kind`. Raises ModelError where there is none."""
        settings = self.settings
        found = str(settings.get("model_type", ""))
        if found not in ARCHITECTURES[kind]:
            raise ModelError(
                f"{self.name} is of the architecture {found!r}, which encodes no {kind} here",
                where=f"model.encoder.{kind}",
                hint=f"take one of {', '.join(ARCHITECTURES[kind])}",
            )
        part = _PARTS.get(found, {}).get(kind)
        return {**settings[part], "model_type": found} if part else settings


def find(name: str, sha256: str = "", *, download: bool = False) -> Weights:
    """The weights that a setting "hf:..." names.

    sha256    what their digest must be; empty: anything
    download  get them from the hub where they are not in its cache on this machine

    Raises DataError where they are not there, have another digest, or are pickled.
    """
    name = name.removeprefix(PRETRAINED)
    folder = Path(name) if Path(name).is_dir() else _from_hub(name, download)
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise DataError(
            f"{name} has no weights in model.safetensors; pickled ones are never read, since "
            "reading them can run any code",
            where="model.encoder",
            hint="model.save_pretrained(FOLDER) of transformers writes safetensors",
        )
    if not (folder / "config.json").is_file():
        raise DataError(f"{name} has no config.json", where="model.encoder")
    files = [folder / "config.json", folder / "preprocessor_config.json", *weights]
    stamps = ((path, path.stat()) for path in files if path.is_file())
    found = _digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stamps))
    if sha256 and found != sha256.lower():
        raise DataError(
            f"the digest of {name} is {found}, but the configuration has another",
            where="model.encoder",
            hint="get the weights that the federation agreed on",
        )
    return Weights(name=name, folder=folder, sha256=found)


def load(weights: Weights, kind: str) -> nn.Module:
    """The network that encodes `kind`, with its weights as float32; on torch's device "meta"
    without any. Heads and poolers that no encoder needs are left out.

    Raises DataError where the files cannot be used, ModelError where they are of no architecture
    for it.
    """
    settings = weights.settings_for(kind)
    empty = torch.empty(0).device.type == "meta"
    load_torchaudio()  # transformers looks for it, and may find one that cannot be imported
    import transformers

    with _quiet():
        try:
            cls = _class(settings["model_type"], kind)
            if empty:
                config = transformers.AutoConfig.from_pretrained(weights.folder)
                part = _PARTS.get(settings["model_type"], {}).get(kind)
                model, missing = cls._from_config(getattr(config, part) if part else config), []
            else:
                model, told = cls.from_pretrained(
                    weights.folder,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
                missing = [*told["missing_keys"], *told["mismatched_keys"]]
        except Exception as error:  # of transformers, safetensors, json: all mean the same here
            raise DataError(
                f"the weights of {weights.name} cannot be loaded ({type(error).__name__})",
                where=f"model.encoder.{kind}",
                hint="is the folder whole? get it again",
            ) from None
    lacking = [str(key) for key in missing if "pooler" not in str(key)]
    if lacking:
        raise DataError(
            f"{len(lacking)} weights are missing from {weights.name}, such as {min(lacking)}",
            where=f"model.encoder.{kind}",
            hint="the files do not fit their config.json: get them again",
        )
    if settings["model_type"] == "whisper":
        return model.encoder  # type: ignore[no-any-return]
    if hasattr(model, "pooler"):
        model.pooler = None
    return model  # type: ignore[no-any-return]


def _class(model_type: str, kind: str) -> Any:
    import transformers as t

    match model_type, kind:
        case "bert", _:
            return t.BertModel
        case "roberta", _:
            return t.RobertaModel
        case "distilbert", _:
            return t.DistilBertModel
        case "vit", _:
            return t.ViTModel
        case "wav2vec2", _:
            return t.Wav2Vec2Model
        case "audio-spectrogram-transformer", _:
            return t.ASTModel
        case "whisper", _:
            return t.WhisperModel
        case _, "text":
            return t.CLIPTextModel
        case _:
            return t.CLIPVisionModel


def _from_hub(name: str, download: bool) -> Path:
    """The folder of a hub id in the cache. Raises DataError."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    if not _HUB_ID.fullmatch(repository):
        raise DataError(
            f"no folder {name}",
            where="model.encoder",
            hint="name a folder that save_pretrained wrote, or a hub id",
        )
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=_FILES,
                local_files_only=not download,
            )
        )
    except Exception as error:  # of the hub's client and of whatever carries its requests
        raise DataError(
            f"{name} is no folder, and its weights are not in the hub's cache on this machine"
            + (f", nor to be had from it ({type(error).__name__})" if download else ""),
            where="model.encoder",
            hint=f"where there is a network: hf download {repository}"
            + (f" --revision {revision}" if revision else ""),
        ) from None


@lru_cache(maxsize=32)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for path, size, _ in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {size} {content}\n".encode())
    return whole.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} cannot be read ({type(error).__name__})") from None
    return found if isinstance(found, dict) else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no reports of what a checkpoint has besides; torch's generator as it was."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
