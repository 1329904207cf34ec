"""Networks of a few thousand random weights, written as transformers writes real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fedfuse.batch import Batch, Kind, Modality, Schema, Target, TargetKind
from fedfuse.models.pretrained import load_torchaudio

VOCABULARY = 60
SHAPES = {"text": (7,), "image": (3, 16, 16), "audio": (3000,)}
KINDS = {
    "bert": "text", "roberta": "text", "distilbert": "text", "clip-text": "text",
    "vit": "image", "clip-vision": "image", "wav2vec2": "audio", "ast": "audio", "whisper": "audio",
}  # fmt: skip
"""What each name encodes here; CLIP's two are one folder."""


def weights(folder: Path, name: str) -> str:
    """The setting "hf:..." of a network, made in `folder` the first time."""
    path = folder / name.partition("-")[0]
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _made(path.name).save_pretrained(path)
        if path.name in ("vit", "clip"):
            _describe(path, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
        if path.name == "bert":
            _write_tokenizer(path)
    return f"hf:{path}"


def _made(name: str) -> Any:
    load_torchaudio()
    import transformers as t

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32}  # fmt: skip
    words = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
    image = {"image_size": 16, "patch_size": 8}
    match name:
        case "bert":
            return t.BertModel(t.BertConfig(**size, **words))
        case "roberta":
            return t.RobertaModel(t.RobertaConfig(**size, **words))
        case "distilbert":
            return t.DistilBertModel(
                t.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **words)
            )
        case "vit":
            return t.ViTModel(t.ViTConfig(**size, **image))
        case "clip":
            ends = {"bos_token_id": 58, "eos_token_id": 59}
            return t.CLIPModel(
                t.CLIPConfig(
                    text_config={**size, **words, **ends},
                    vision_config={**size, **image},
                    projection_dim=8,
                )
            )
        case "wav2vec2":
            return t.Wav2Vec2Model(
                t.Wav2Vec2Config(
                    **size, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8),
                    num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                    num_conv_pos_embedding_groups=2,
                )
            )  # fmt: skip
        case "ast":
            return t.ASTModel(
                t.ASTConfig(
                    **size, max_length=32, num_mel_bins=16, patch_size=8, frequency_stride=8,
                    time_stride=8,
                )
            )  # fmt: skip
        case _:
            return t.WhisperModel(
                t.WhisperConfig(
                    vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=1,
                    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
                    decoder_ffn_dim=32, num_mel_bins=16, max_source_positions=50,
                    max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                    decoder_start_token_id=1,
                )
            )  # fmt: skip


def _describe(path: Path, **settings: object) -> None:
    (path / "preprocessor_config.json").write_text(json.dumps(settings))


def _write_tokenizer(path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "pump", "the", "a"]
    words += [f"w{number}" for number in range(VOCABULARY - len(words))]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(path)


def schema_of(kind: str) -> Schema:
    """One modality that a network encodes, beside a vector."""
    return Schema(
        modalities=(
            Modality(name=kind, kind=Kind(kind), shape=SHAPES[kind]),
            Modality(name="vector", kind=Kind.VECTOR, shape=(4,)),
        ),
        target=Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b", "c")),
    )


def batch_of(kind: str, size: int, *, present: float = 0.6) -> Batch:
    """Random records, of which some lack a modality, and words and sounds end early."""
    draw = torch.Generator().manual_seed(3)
    inputs, there = {}, {}
    for modality in schema_of(kind).modalities:
        shape = (size, *modality.shape)
        value = torch.randn(shape, generator=draw, dtype=torch.float64)
        if modality.kind is Kind.TEXT:
            value = torch.randint(1, VOCABULARY + 1, shape, generator=draw)
        if modality.kind in (Kind.TEXT, Kind.AUDIO):
            value[::2, -modality.shape[0] // 3 :] = 0
        here = torch.rand(size, generator=draw) < present
        value[~here] = 0
        inputs[modality.name], there[modality.name] = value, here
    return Batch(inputs, there, torch.randint(0, 3, (size,), generator=draw))
