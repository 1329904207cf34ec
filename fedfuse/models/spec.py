"""The settings of the model. Every field is public knowledge."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "ABSENT", "CLASS_WEIGHTS", "ENCODERS", "FUSIONS", "LOSSES", "PRETRAINED", "PRETRAINED_KINDS",
    "TUNINGS", "AuxiliaryConfig", "EncoderConfig", "ModelConfig",
]  # fmt: skip

FUSIONS = {
    "concat": "concat.ConcatFusion",
    "sum": "weighted.SumFusion",
    "gated": "weighted.GatedFusion",
    "mlp": "concat.MlpFusion",
    "multiplicative": "tensor.MultiplicativeFusion",
    "tensor": "tensor.TensorFusion",
    "low-rank": "tensor.LowRankFusion",
    "film": "film.FilmFusion",
    "attention": "attention.AttentionFusion",
    "cross-attention": "crossmodal.CrossAttentionFusion",
    "co-attention": "crossmodal.CoAttentionFusion",
    "bottleneck": "bottleneck.BottleneckFusion",
    "experts": "late.ExpertsFusion",
    "graph": "graph.GraphFusion",
    "late": "late.LateFusion",
    "early": "concat.RawFusion",
}
"""Each fusion operator: its file under `fedfuse/models/fusion/` and its class there, imported where
a model is built. Whoever reads a configuration needs the names alone, and no torch."""
ABSENT = ("zero", "learned")
LOSSES = ("auto", "cross-entropy", "focal", "mse", "mae", "huber")
CLASS_WEIGHTS = ("none", "priors")
ENCODERS = {
    "image": ("cnn",),
    "audio": ("cnn", "gru", "transformer"),
    "video": ("pool", "gru", "transformer"),
    "series": ("cnn", "gru", "transformer"),
    "text": ("bag", "transformer", "gru"),
}
"""The encoders of each kind of modality that has a choice, or may have; the first one is taken."""
PRETRAINED = "hf:"
"""How the name of a pretrained encoder begins: a folder or a hub id of transformers follows."""
PRETRAINED_KINDS = ("text", "image", "audio")
TUNINGS = ("frozen", "lora", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Which encoder each kind of modality has: one of its ENCODERS, or "hf:" with the folder or hub
    id of a pretrained one (text, image, audio); "hf:NAME@REVISION" is one commit of it."""

    image: str = "cnn"
    audio: str = "cnn"
    video: str = "pool"
    series: str = "cnn"
    text: str = "bag"
    text_sha256: str = ""
    """The digest of the pretrained weights, the same at all sites. A simulation fills it in; for
    real nodes it must be given: `fedfuse check` tells it."""
    image_sha256: str = ""
    audio_sha256: str = ""
    tuning: str = "frozen"
    """What of pretrained encoders is trained: nothing ("frozen"), low-rank additions to their
    attention ("lora"), or everything ("full")."""
    lora_rank: int = 8
    lora_alpha: float = 16.0
    """The additions are scaled by lora_alpha / lora_rank."""

    def pretrained(self, kind: str) -> bool:
        """Whether modalities of `kind` have a pretrained encoder."""
        return kind in PRETRAINED_KINDS and str(getattr(self, kind)).startswith(PRETRAINED)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryConfig:
    """Weights of losses beside the fused one, in training alone; 0 is without. `auxiliary.py` says
    what each is, and what it does to the guarantee."""

    unimodal: float = 0.0
    """Each modality's own head, of those that are there."""
    reconstruction: float = 0.0
    """Each modality's token from those of the others."""
    alignment: float = 0.0
    """A record's tokens near each other."""
    anchors: float = 0.0
    """Each token near the public anchor of its class."""
    contrast: float = 0.0
    """In-batch contrast: couples records, so for unit "none" alone."""
    correlation: float = 0.0
    """Canonical correlation over the batch: likewise."""

    @property
    def any(self) -> bool:
        """Whether there is any."""
        return any(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def couples(self) -> bool:
        """Whether a record's gradient depends on other records."""
        return bool(self.contrast or self.correlation)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Widths and depths of the encoders, the fusion and the head."""

    dim: int = 32
    """Width D of the token that each modality is encoded to."""
    fusion: str = "concat"
    """One of FUSIONS."""
    fusion_layers: int = 1
    """Layers of the operators that have layers."""
    fusion_heads: int = 4
    """Attention heads of the operators that have them; divides dim."""
    fusion_width: int = 0
    """What mlp, multiplicative, low-rank and early give. 0: as wide as dim."""
    fusion_rank: int = 8
    """Of products between modalities: multiplicative, tensor, low-rank."""
    fusion_tokens: int = 4
    """Bottleneck tokens."""
    knowledge: str = ""
    """The file of triples of fusion = "graph": head, tab, relation, tab, tail in each line."""
    knowledge_sha256: str = ""
    """What that file's digest must be, the same at all sites: `sha256sum FILE` tells it."""
    absent: str = "zero"
    """What stands for an absent modality: "zero" hides it from the operator; "learned" is a
    trained token in its place."""
    modality_dropout: float = 0.0
    """Chance that a modality of a record is left out of a training step, never all of a record."""
    time_shift: float = 0.0
    """The most by which a sound or series is moved in time in a training step, either way, as a
    share of its length."""
    image_shift: float = 0.0
    """The same of an image or video, along both of its sides."""
    head_width: int = 32
    """Hidden units of the head; 0 makes it linear."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)

    image_width: int = 8
    """Channels of the first image convolution; each further layer doubles them."""
    image_depth: int = 3
    """Convolutions of the image encoder."""
    image_terms: int = 8
    """Beside the convolutions, so many 2-D cosine terms in each direction; 0 leaves them out."""
    audio_width: int = 8
    """Channels of the first audio convolution."""
    audio_depth: int = 3
    """Convolutions of the audio encoder."""
    audio_terms: int = 18
    """The same of a spectrogram: over frequency that is its cepstrum."""
    video_width: int = 8
    """Channels of the first convolution over each frame."""
    video_depth: int = 3
    """Convolutions over each frame."""
    video_terms: int = 6
    """Cosine terms of each frame in each direction."""
    series_width: int = 16
    """Channels of the first convolution over time."""
    series_depth: int = 2
    """Convolutions of the series encoder."""
    steps_width: int = 32
    """Width of a step in the GRU or Transformer of a sound, a video or a series."""
    steps_layers: int = 1
    """Their layers."""
    steps_heads: int = 2
    """Attention heads; divides steps_width."""
    vector_width: int = 32
    """Hidden units of the encoder of vectors and tables."""
    text_width: int = 64
    """Width of a word's vector."""
    text_layers: int = 1
    """Transformer or GRU layers."""
    text_heads: int = 2
    """Attention heads; divides text_width."""
    learned_words: bool = False
    """Train the word vectors. False keeps them at fixed public random values, which costs no
    noise: under DP noise grows with the number of trained parameters."""

    loss: str = "auto"
    """One of LOSSES. "auto": cross-entropy of classes and labels, huber of numbers; an ordinal
    target has its own (CORN), and no other."""
    focal_gamma: float = 2.0
    """How much focal loss plays down what is already right."""
    class_weights: str = "none"
    """"priors": classes weigh by the inverse of their shares as declared, which are public; they
    are never counted."""
