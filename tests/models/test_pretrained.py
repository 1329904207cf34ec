"""Pretrained encoders: exact clipped sums, what travels, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfuse.batch import Kind, Modality
from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError, DataError, FedfuseError, ModelError
from fedfuse.federation.pinning import check_pinned, pin
from fedfuse.models.backbone import Backbone, PretrainedEncoder
from fedfuse.models.encoders import build_encoder
from fedfuse.models.model import FusionModel, build_model, count_parameters
from fedfuse.models.pretrained import find
from fedfuse.models.spec import TUNINGS, EncoderConfig, ModelConfig
from fedfuse.train import Trainer
from tests.privacy.test_clipping import TASK, assert_same, clipped_sum
from tests.tiny import KINDS, SHAPES, VOCABULARY, batch_of, schema_of, weights


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def config_of(folder: Path, name: str, **changes: Any) -> ModelConfig:
    encoder: dict[str, Any] = {KINDS[name]: weights(folder, name), "lora_rank": 2, **changes}
    fusion = encoder.pop("fusion", "concat")
    return ModelConfig(
        dim=8, fusion=fusion, fusion_heads=2, head_width=6, encoder=EncoderConfig(**encoder)
    )


def model_of(folder: Path, name: str, **changes: Any) -> FusionModel:
    config = config_of(folder, name, **changes)
    model = build_model(schema_of(KINDS[name]), config, vocabulary=VOCABULARY + 1).double().train()
    draw = torch.Generator().manual_seed(1)
    for key, p in model.named_parameters():
        if "lora_B" in key:  # they begin at zero, where half of the gradients are zero too
            p.data = 0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return model


def oracle(model: FusionModel, batch: Any, clip_norm: float) -> list[torch.Tensor]:
    """The sum of clipped gradients of what is trained, one record at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for row in range(len(batch)):
        one = batch[slice(row, row + 1)]
        loss = TASK.loss(model(one), one.target).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        norm = float(torch.stack([g.norm() for g in grads]).norm())
        for part, g in zip(total, grads, strict=True):
            part += g * min(1.0, clip_norm / max(norm, 1e-30))
    return total


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("name", KINDS)
def test_clipped_sum_equals_a_loop_over_records(folder: Path, name: str, tuning: str) -> None:
    fusion = "co-attention" if name in ("bert", "vit", "wav2vec2") else "concat"
    model = model_of(folder, name, tuning=tuning, fusion=fusion)
    batch = batch_of(KINDS[name], 4)
    for clip_norm in (0.05, 100.0):
        assert_same(clipped_sum(model, batch, clip_norm), oracle(model, batch, clip_norm))


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("name", ["bert", "vit", "wav2vec2", "whisper"])
def test_only_what_is_trained_travels_and_is_counted(folder: Path, name: str, tuning: str) -> None:
    config = config_of(folder, name, tuning=tuning)
    schema = schema_of(KINDS[name])
    model = build_model(schema, config, vocabulary=VOCABULARY + 1)
    trainer = Trainer(model, TASK.loss, torch.device("cpu"))
    assert set(trainer.weights()) == trainer.trainable
    sent = sum(value.size for value in trainer.weights().values())
    assert sent == count_parameters(schema, config, vocabulary=VOCABULARY + 1)
    networks = {key.split(".")[3] for key in trainer.trainable if ".network." in key}
    assert bool(networks) == (tuning != "frozen")
    if tuning == "lora":
        own = [key for key in trainer.trainable if ".network." in key]
        assert own
        assert all("lora_" in key for key in own)


def test_full_tuning_trains_all_but_constants(folder: Path) -> None:
    for name, constants in (("vit", set()), ("wav2vec2", {"masked_spec_embed"}),
                            ("whisper", {"embed_positions.weight"})):  # fmt: skip
        network = model_of(folder, name, tuning="full").encoders[0].network.model
        fixed = {key for key, p in network.named_parameters() if not p.requires_grad}
        assert fixed == constants


@pytest.mark.parametrize("name", KINDS)
def test_network_gives_what_it_gives_alone(folder: Path, name: str) -> None:
    """Also with padding in the batch, and weight norm folded in."""
    kind = KINDS[name]
    found = {}
    for tuning in TUNINGS:
        torch.manual_seed(0)
        encoder = model_of(folder, name, tuning=tuning).float().encoders[0]
        for key, p in encoder.named_parameters():
            if "lora_B" in key:
                p.data.zero_()
        x = batch_of(kind, 4, present=1.0).inputs[kind]
        with torch.no_grad():
            found[tuning] = encoder.features(x if kind == "text" else x.float())
            alone = [encoder.features(row.unsqueeze(0) if kind == "text" else row.float()[None])
                     for row in x]  # fmt: skip
        for row, one in enumerate(alone):
            assert torch.allclose(found[tuning].whole[row], one.whole[0], atol=2e-5)
    for tuning in ("lora", "full"):
        assert torch.allclose(found[tuning].whole, found["frozen"].whole.float(), atol=2e-5)


def test_words_and_pixels_reach_the_network_as_it_wants_them(folder: Path) -> None:
    from transformers import AutoTokenizer, BertModel, ViTModel

    bert = weights(folder, "bert").removeprefix("hf:")
    words = AutoTokenizer.from_pretrained(bert)("the red pump", return_tensors="pt")
    with torch.no_grad():
        expected = BertModel.from_pretrained(bert).eval()(**words).last_hidden_state
        modality = Modality(name="text", kind=Kind.TEXT, shape=(9,))
        ids = torch.zeros(1, 9, dtype=torch.int64)
        ids[0, : words["input_ids"].shape[1]] = words["input_ids"][0] + 1
        found = Backbone(find(f"hf:{bert}"), modality)(ids)
        assert found.seen is not None
        assert torch.allclose(found.parts[found.seen], expected[0], atol=1e-5)
        assert torch.allclose(found.whole[0], expected[0].mean(0), atol=1e-5)

        vit = weights(folder, "vit").removeprefix("hf:")
        pixels = torch.rand(2, 1, 16, 16)
        mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
        scaled = (pixels.expand(-1, 3, -1, -1) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        expected = ViTModel.from_pretrained(vit).eval()(pixel_values=scaled).last_hidden_state
        gray = Modality(name="image", kind=Kind.IMAGE, shape=(1, 16, 16))
        assert torch.allclose(Backbone(find(f"hf:{vit}"), gray)(pixels).parts, expected, atol=1e-5)


def test_stored_features_give_the_model_the_same_numbers(folder: Path) -> None:
    for name, fusion in (("bert", "co-attention"), ("ast", "concat")):
        kind = KINDS[name]
        model = model_of(folder, name, fusion=fusion)
        batch = batch_of(kind, 5)
        encoder = model.encoders[0]
        assert isinstance(encoder, PretrainedEncoder)
        packed = encoder.pack(batch.inputs[kind])
        assert packed is not None
        made = encoder.made(5, torch.Generator())
        assert made is not None
        assert made.dim() == packed.dim()
        assert made.shape[-1] == packed.shape[-1]
        packed[~batch.present[kind]] = 0
        inputs = {**batch.inputs, kind: packed}
        assert torch.allclose(model(dataclasses.replace(batch, inputs=inputs)), model(batch))


def test_network_draws_no_chance_in_training(folder: Path) -> None:
    for name in ("bert", "wav2vec2"):
        for tuning in ("lora", "full"):
            model, batch = model_of(folder, name, tuning=tuning), batch_of(KINDS[name], 4)
            assert torch.equal(model(batch), model(batch))


def test_digest_is_of_the_files_and_another_is_refused(folder: Path, tmp_path: Path) -> None:
    name = weights(folder, "bert")
    found = find(name)
    path = Path(name.removeprefix("hf:"))
    whole = hashlib.sha256()
    for file in ("config.json", "model.safetensors"):
        content = (path / file).read_bytes()
        whole.update(f"{file} {len(content)} {hashlib.sha256(content).hexdigest()}\n".encode())
    assert found.sha256 == whole.hexdigest()
    assert find(name, found.sha256) == found
    for file in ("config.json", "model.safetensors"):
        other = tmp_path / file
        shutil.copytree(path, other)
        data = bytearray((other / file).read_bytes())
        data[-2] ^= 1
        (other / file).write_bytes(data)
        with pytest.raises(DataError, match="the configuration has another"):
            find(f"hf:{other}", found.sha256)
    config = config_of(folder, "bert", text_sha256="0" * 64)
    for make in (build_model, count_parameters):
        with pytest.raises(DataError, match="the configuration has another"):
            make(schema_of("text"), config, vocabulary=VOCABULARY + 1)


def test_pickled_weights_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    path = Path(weights(folder, "bert").removeprefix("hf:"))
    shutil.copy(path / "config.json", tmp_path)
    ran = tmp_path / "ran"
    torch.save(_Runs(str(ran)), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickled ones are never read"):
        find(f"hf:{tmp_path}")
    assert not ran.exists()


class _Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def test_weights_that_are_not_there_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    for download in (False, True):
        with pytest.raises(DataError, match="not in the hub's cache") as caught:
            find("hf:nobody/nothing@abc", download=download)
        assert "hf download nobody/nothing --revision abc" in caught.value.hint
    with pytest.raises(DataError, match="no folder"):
        find("hf:/no/such/folder")


def test_files_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    path = Path(weights(folder, "bert").removeprefix("hf:"))

    def changed(name: str, **changes: Any) -> str:
        other = tmp_path / name
        shutil.copytree(path, other)
        settings = json.loads((path / "config.json").read_text()) | changes
        (other / "config.json").write_text(json.dumps(settings))
        return f"hf:{other}"

    modality = Modality(name="text", kind=Kind.TEXT, shape=(7,))
    for name, error, said in (
        (changed("deeper", num_hidden_layers=3), DataError, "weights are missing"),
        (changed("wider", hidden_size=32), DataError, "weights are missing|cannot be loaded"),
        (changed("gpt", model_type="gpt2"), ModelError, "'gpt2', which encodes no text"),
        (changed("none", model_type="../x"), ModelError, "encodes no text"),
    ):
        with pytest.raises(error, match=said):
            Backbone(find(name), modality)
    broken = changed("broken")
    (Path(broken.removeprefix("hf:")) / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(DataError, match="cannot be loaded"):
        Backbone(find(broken), modality)


@pytest.mark.parametrize(
    ("name", "shape", "vocabulary", "hint"),
    [
        ("bert", (41,), 61, "data.text_tokens = 40"),
        ("roberta", (39,), 61, "data.text_tokens = 38"),
        ("bert", (7,), 4096, "data.vocabulary = 61"),
        ("vit", (3, 32, 32), 61, "data.image_size = 16"),
        ("wav2vec2", (40, 32), 61, 'data.audio_features = "wave"'),
    ],
)
def test_records_of_another_form_are_refused(
    folder: Path, name: str, shape: tuple[int, ...], vocabulary: int, hint: str
) -> None:
    kind = KINDS[name]
    modality = Modality(name=kind, kind=Kind(kind), shape=shape)
    with pytest.raises(ModelError) as caught:
        build_encoder(modality, config_of(folder, name), vocabulary)
    assert hint in caught.value.hint


def test_pinning_writes_out_what_follows_from_the_files(folder: Path) -> None:
    names = {"text": "bert", "image": "vit", "audio": "wav2vec2"}
    config = RunConfig().with_values(
        {f"model.encoder.{kind}": weights(folder, name) for kind, name in names.items()}
    )
    with pytest.raises(ConfigError, match="text_sha256 is empty"):
        check_pinned(config)
    pinned = pin(config)
    check_pinned(pinned)
    data, encoder = pinned.data, pinned.model.encoder
    assert (data.image_size, data.sample_rate, data.audio_features) == (16, 16_000, "wave")
    assert (data.tokenizer, data.vocabulary) == (weights(folder, "bert")[3:], VOCABULARY + 1)
    assert encoder.image_sha256 == find(weights(folder, "vit")).sha256
    assert pin(pinned) == pinned
    assert RunConfig.from_flat(pinned.to_flat()) == pinned
    with pytest.raises(FedfuseError, match="16000 samples a second"):
        pin(config.with_values({"data.sample_rate": 8000}))
    with pytest.raises(DataError, match="the configuration has another"):
        pin(config.with_values({"model.encoder.text_sha256": "0" * 64}))


def test_settings_that_make_no_sense_are_refused() -> None:
    for changes, said in (
        ({"model.encoder.series": "hf:x"}, "model.encoder.series = 'hf:x'"),
        ({"model.encoder.tuning": "half"}, "model.encoder.tuning = 'half'"),
        ({"model.encoder.text": "hf:x", "model.fusion": "early"}, "has no encoders"),
        ({"model.encoder.text": "hf:x", "model.encoder.text_sha256": "1"}, "must be a SHA-256"),
        ({"data.audio_features": "wave"}, "only pretrained audio encoders"),
    ):
        with pytest.raises(ConfigError, match=said):
            RunConfig().with_values(changes)


def test_shapes_of_the_kinds_are_those_that_are_tested() -> None:
    assert set(KINDS.values()) == set(SHAPES)
