"""Encoders with public weights: what goes in, what comes out, what of it is trained.

    text    its own token ids (data.tokenizer), the mean over the words, or CLIP's end token
    image   (pixels - mean) / std as its preprocessor_config.json says (one half without one), the
            first token, or CLIP's pooled one
    audio   the waveform (data.audio_features = "wave"): as it is for wav2vec2, as the network's own
            log-mel spectrogram for AST and Whisper; the mean over the frames, or AST's two tokens

The network stays in eval mode: no dropout, no skipped layers, no masked spans. A private step then
has no chance but that of sampling and noise, and a record's gradient is a function of the record.

    frozen  no weight of the network is trained, sent or counted, and it is no part of the model's
            state: it is loaded where a raw record comes. `pack` makes features of records that a
            prepared store keeps, so that training reads those and costs the layers after it
    lora    W x + (alpha / r) B A x in place of W x, for query and value of each attention (Hu et
            al. 2021, arXiv:2106.09685v2, section 4.2); A and B are Linear layers, made by peft
    full    every weight, those outside of layers by the engine's fallback

Features are brought to mean 0 and variance 1 by their own numbers, so all records weigh alike
before gradients are clipped.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fedfuse.batch import Kind, Modality
from fedfuse.errors import ModelError
from fedfuse.models.blocks import masked_mean
from fedfuse.models.encoder import Encoder, Features
from fedfuse.models.pretrained import Weights, find, load
from fedfuse.models.spec import EncoderConfig, ModelConfig

__all__ = ["Backbone", "PretrainedEncoder"]

_LORA_TARGETS = ["query", "value", "q_lin", "v_lin", "q_proj", "v_proj"]
"""What the architectures call the layers of query and value."""
_CONSTANTS = ("model.masked_spec_embed", "model.embed_positions.weight")
"""Of wav2vec2, for spans that are masked in training, which is off; of Whisper, sinusoids."""


class PretrainedEncoder(Encoder):
    """(B, *shape) raw records, or (B, ...) features as `pack` gives them -> one token (B, D)."""

    def __init__(
        self, modality: Modality, config: ModelConfig, vocabulary: int, *, sequence: bool
    ) -> None:
        """Raises DataError where the weights are not there or others, ModelError where they are
        no encoder of `modality`."""
        super().__init__()
        kind, choice = modality.kind.value, config.encoder
        name = getattr(choice, kind)
        self.weights = find(name, getattr(choice, f"{kind}_sha256"))
        self.modality = modality
        self.frozen = choice.tuning == "frozen"
        settings = self.weights.settings_for(kind)
        _check_shape(modality, settings, vocabulary, name)
        self.network: Backbone | None = None
        if not self.frozen:
            self.network = _trained(Backbone(self.weights, modality), choice)
        width = _width(settings)
        self._ends(width, width, config.dim, sequence=sequence)

    def features(self, x: Tensor) -> Features:
        """(B, *shape) -> the record (B, W), and its words, places or frames (B, T, W)."""
        if self.frozen and self._packed(x):
            return self._unpack(x)
        if not self.frozen:
            assert self.network is not None
            return _scaled(self.network(x))
        like = self.project.weight
        with torch.set_grad_enabled(x.requires_grad):  # of the input, where somebody asks why
            network = _frozen(self.weights, self.modality, str(x.device))
            whole, parts, seen = _scaled(network(x.float() if x.is_floating_point() else x))
        assert parts is not None
        return Features(whole.to(like.dtype), parts.to(like.dtype), seen)

    def pack(self, x: Tensor) -> Tensor | None:
        """(B, *shape) raw records -> what `features` gives of them, in one float32 tensor:
        (B, W), or where a fusion asks for parts (B, 1 + T, W + 1) with "seen" last.

        None where the network is trained, or features could not be told from raw records.
        """
        if not self.frozen:
            return None
        with torch.no_grad():
            whole, parts, seen = self.features(x)
            if self.place is not None:
                assert parts is not None
                there = x.new_ones(parts.shape[:2]) if seen is None else seen
                flags = F.pad(there.float(), (1, 0), value=1.0).unsqueeze(-1)
                both = torch.cat([whole.unsqueeze(1), parts], 1).float()
                whole = torch.cat([both, flags], 2)
        return whole.float() if self._packed(whole) else None

    def made(self, rows: int, draw: torch.Generator) -> Tensor | None:
        """Random features in the form of `pack`, for which no network has to be loaded; with parts
        there are three of them."""
        width = self.project.in_features
        if self.place is None:
            x = torch.randn(rows, width, generator=draw)
        else:
            x = torch.randn(rows, 4, width + 1, generator=draw)
            x[..., -1] = 1.0
        return x if self.frozen and self._packed(x) else None

    def _packed(self, x: Tensor) -> bool:
        return x.is_floating_point() and tuple(x.shape[1:]) != self.modality.shape

    def _unpack(self, x: Tensor) -> Features:
        x = x.to(self.project.weight.dtype)
        if x.dim() == 2:
            return Features(x)
        return Features(x[:, 0, :-1], x[:, 1:, :-1], x[:, 1:, -1] > 0)


class Backbone(nn.Module):
    """A pretrained network with what has to be done to a record before it."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Weights, modality: Modality) -> None:
        super().__init__()
        self.kind = modality.kind
        settings, before = weights.settings_for(modality.kind.value), weights.preprocessor
        self.architecture = str(settings["model_type"])
        self.model: Any = load(weights, modality.kind.value)
        self.rate = int(before.get("sampling_rate", 16_000))
        for key in ("mean", "std"):
            public = torch.tensor(before.get(f"image_{key}", [0.5, 0.5, 0.5]))
            self.register_buffer(key, public.view(-1, 1, 1), persistent=False)
        self.padding = int(settings.get("pad_token_id") or 0)
        self.centred = bool(before.get("do_normalize", True))
        self.listen = _log_mel_of(self.architecture, settings, before)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Features:
        """(B, *shape) -> (B, W), (B, T, W), and for text (B, T) which are words."""
        match self.kind:
            case Kind.TEXT:
                return self._text(x)
            case Kind.IMAGE:
                found = self.model(pixel_values=(x.expand(-1, 3, -1, -1) - self.mean) / self.std)
                return _first_or_pooled(found)
            case _:
                return self._audio(x)

    def _text(self, ids: Tensor) -> Features:
        seen = ids > 0
        real = torch.where(seen, ids - 1, self.padding)
        # A record without a word attends to its first place: attention to nothing is NaN.
        mask = seen | (torch.arange(ids.shape[1], device=ids.device) == 0)
        found = self.model(input_ids=real, attention_mask=mask.long())
        h = found.last_hidden_state
        clip = self.architecture.startswith("clip")
        return Features(found.pooler_output if clip else masked_mean(h, mask), h, seen)

    def _audio(self, x: Tensor) -> Features:
        if self.architecture == "wav2vec2":
            return self._waves(x)
        waves = [wave.numpy() for wave in x.detach().cpu().float()]
        told = self.listen(waves, sampling_rate=self.rate, return_tensors="pt")
        heard = next(iter(told.values())).to(x)
        found = self.model(heard)
        if self.architecture == "whisper":
            return Features(found.last_hidden_state.mean(1), found.last_hidden_state)
        return _first_or_pooled(found)

    def _waves(self, x: Tensor) -> Features:
        """A record ends at its last sample that is not 0; one of silence alone is all heard."""
        place = torch.arange(1, x.shape[1] + 1, device=x.device)
        end = (place * (x != 0)).amax(1)
        end = torch.where(end > 0, end, x.shape[1]).clamp(min=min(_LEAST_WAVE, x.shape[1]))
        heard = place <= end[:, None]
        if self.centred:
            level = masked_mean(x.unsqueeze(-1), heard)
            spread = masked_mean((x - level).square().unsqueeze(-1), heard)
            x = torch.where(heard, (x - level) * (spread + 1e-7).rsqrt(), 0.0)
        masks = self.model.config.feat_extract_norm == "layer"  # the others were trained without
        h = self.model(x, attention_mask=heard.long() if masks else None).last_hidden_state
        frames = self.model._get_feat_extract_output_lengths(end)
        seen = torch.arange(h.shape[1], device=x.device) < frames[:, None]
        return Features(masked_mean(h, seen), h, seen)


_LEAST_WAVE = 400
"""Samples that one frame of wav2vec2 hears."""


def _first_or_pooled(found: Any) -> Features:
    pooled = found.pooler_output
    h = found.last_hidden_state
    return Features(h[:, 0] if pooled is None else pooled, h)


def _scaled(found: Features) -> Features:
    whole, parts, seen = found
    assert parts is not None
    return Features(
        F.layer_norm(whole, whole.shape[-1:]), F.layer_norm(parts, parts.shape[-1:]), seen
    )


@lru_cache(maxsize=4)
def _frozen(weights: Weights, modality: Modality, device: str) -> Backbone:
    """One for all models of a process."""
    return Backbone(weights, modality).requires_grad_(False).to(device)


def _trained(network: Backbone, choice: EncoderConfig) -> Backbone:
    """`network` with what is to be trained, all else frozen."""
    if choice.tuning == "lora":
        network.model = _with_lora(network.model, choice)
        return network
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # off in any case; the engine's fallback wants to see it so
        if parametrize.is_parametrized(module):  # wav2vec2's weight norm, folded in: the same sums
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
    for name, parameter in network.named_parameters():
        if name in _CONSTANTS:
            parameter.requires_grad_(False)
    return network


def _with_lora(model: nn.Module, choice: EncoderConfig) -> nn.Module:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ModelError(
            'model.encoder.tuning = "lora" needs peft',
            where="model.encoder.tuning",
            hint="pip install 'fedfuse[lora]'",
        ) from None
    config = LoraConfig(
        r=choice.lora_rank,
        lora_alpha=choice.lora_alpha,  # type: ignore[arg-type]
        target_modules=_LORA_TARGETS,
        lora_dropout=0.0,
        bias="none",
    )
    return inject_adapter_in_model(config, model)


def _log_mel_of(architecture: str, settings: dict[str, Any], before: dict[str, Any]) -> Any:
    """The network's own spectrogram; None where it takes no such."""
    if architecture not in ("whisper", "audio-spectrogram-transformer"):
        return None
    import transformers

    known = {key: value for key, value in before.items() if not key.endswith("_type")}
    if architecture == "whisper":
        rate, hop = known.get("sampling_rate", 16_000), known.get("hop_length", 160)
        known.setdefault("feature_size", settings["num_mel_bins"])
        known.setdefault("chunk_length", 2 * settings["max_source_positions"] * hop // rate)
        return transformers.WhisperFeatureExtractor(**{**known, "dither": 0.0})
    known.setdefault("num_mel_bins", settings["num_mel_bins"])
    known.setdefault("max_length", settings["max_length"])
    return transformers.ASTFeatureExtractor(**known)


def _width(settings: dict[str, Any]) -> int:
    for key in ("hidden_size", "d_model", "dim"):
        if key in settings:
            return int(settings[key])
    raise ModelError("config.json names no hidden_size", where="model.encoder")


def _check_shape(modality: Modality, settings: dict[str, Any], vocabulary: int, name: str) -> None:
    """Raises ModelError where records are not decoded as the network wants them."""
    shape, wrong, hint = modality.shape, "", ""
    match modality.kind:
        case Kind.TEXT:
            most = settings.get("max_position_embeddings", 512)
            if settings["model_type"] == "roberta":
                most -= 1 + int(settings.get("pad_token_id") or 0)  # places begin after it
            if shape[0] > most:
                wrong, hint = f"{shape[0]} tokens", f"data.text_tokens = {most} at most"
            elif vocabulary != settings["vocab_size"] + 1:
                wrong = f"a vocabulary of {vocabulary:,}"
                hint = f"data.vocabulary = {settings['vocab_size'] + 1}, and data.tokenizer its own"
        case Kind.IMAGE:
            size = settings["image_size"]
            if shape[0] not in (1, 3) or shape[1:] != (size, size):
                wrong, hint = " x ".join(map(str, shape)), f"data.image_size = {size}"
        case _ if len(shape) != 1:
            wrong, hint = "a spectrogram", 'data.audio_features = "wave"'
    if wrong:
        raise ModelError(
            f"modality {modality.name!r} is {wrong}, which {name} does not take",
            where="model.encoder",
            hint=f"set {hint}",
        )
