"""U-Net and DeepLabV3+: encoders, odd sizes, smp reads what is saved, weights from folders and S3."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor

from raysseg import storage
from raysseg.catalogue import MODELS
from raysseg.config import Inference, JobError, Loss, Model
from raysseg.export import to_onnx
from raysseg.masks import LabelMap
from raysseg.models import Targets, build_model, load_model
from raysseg.models.smp import KINDS, Smp, find_encoder
from raysseg.schema import ClassMap, InputError
from tests.conftest import example_job

torch.set_num_threads(1)
CLASSES = ClassMap((3, 5), ("road", "car"), ((1, 1, 1), (2, 2, 2)), (False, True))
OTHERS = ClassMap((0, 1), ("sky", "tree"), ((1, 1, 1), (2, 2, 2)), (False, False))
SMALL = "test_resnet"  # an encoder of timm's of half a million parameters


def make(name: str = "unet-tiny", weights: str | None = None, encoder: str | None = None) -> Smp:
    torch.manual_seed(0)
    model = build_model(Model(name=name, weights=weights, encoder=encoder), CLASSES)
    assert isinstance(model, Smp)
    return model


def make_targets(size: tuple[int, int], num: int = 1) -> Targets:
    labels = torch.arange(num * size[0] * size[1]).reshape(num, *size) % 2
    return Targets(labels, torch.ones(num), torch.zeros(num, dtype=torch.int64))


def draw(size: tuple[int, int], num: int = 1) -> Tensor:
    return torch.randint(0, 256, (num, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_job_names_every_model() -> None:
    assert set(KINDS) == {name for name, entry in MODELS.items() if entry.family == "smp"}


@pytest.mark.parametrize(("name", "encoder"), [("unet-tiny", None), ("deeplabv3plus", SMALL)])
@pytest.mark.parametrize("size", [(32, 32), (65, 97)])
def test_odd_sizes_and_single_images_train(name: str, encoder: str | None, size: tuple[int, int]) -> None:
    model = make(name, encoder=encoder).train()
    outputs = model(draw(size), make_targets(size))
    assert outputs.values["logits"].shape == (1, 2, *size)
    sum(outputs.losses.values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    view, *_ = model.eval().decode(model(draw(size)), [(31, 77)], Inference())
    assert isinstance(view, LabelMap)
    assert view.labels.shape == (31, 77)


@pytest.mark.parametrize(("name", "encoder"), [("unet-tiny", None), ("deeplabv3plus", SMALL)])
def test_smp_reads_what_is_saved(name: str, encoder: str | None, tmp_path: Path) -> None:
    model = make(name, encoder=encoder).eval()
    model.save(tmp_path, None)
    theirs = smp.from_pretrained(str(tmp_path)).eval()
    images = draw((64, 96), 2)
    logits = model(images).values["logits"]
    assert torch.equal(theirs(model.normalise(images)), logits)
    ours = load_model(name, tmp_path, CLASSES, "semantic").eval()
    assert torch.equal(ours(images).values["logits"], logits)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


@pytest.mark.parametrize(("name", "encoder"), [("unet-tiny", None), ("deeplabv3plus", SMALL)])
def test_an_exported_graph_pads_as_the_model_does(name: str, encoder: str | None) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make(name, encoder=encoder).eval()
    session = onnxruntime.InferenceSession(to_onnx(model, 18, None, {}))
    for size in ((128, 192), (65, 97)):
        with torch.inference_mode():
            logits = model(draw(size)).values["logits"]
        np.testing.assert_allclose(session.run(None, {"images": draw(size).numpy()})[0], logits, atol=1e-5)


def test_statistics_of_an_encoder_are_kept(tmp_path: Path) -> None:
    model = make()
    Smp(model.net, CLASSES, Loss(), None, ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))).save(tmp_path, (64, 96))
    again = load_model("unet-tiny", tmp_path, CLASSES, "semantic")
    assert again.normalise(torch.full((1, 3, 1, 1), 255.0)).flatten().tolist() == [2.0, 2.0, 2.0]


def test_weights_from_a_folder_and_s3(tmp_path: Path, s3_bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    first = make()
    first.save(tmp_path, None)
    for path in tmp_path.iterdir():
        storage.write_bytes(f"{s3_bucket}/weights/{path.name}", path.read_bytes())
    for weights in (str(tmp_path), f"{s3_bucket}/weights"):
        again = make(weights=weights)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with caplog.at_level(logging.INFO, logger="raysseg"):
        other = build_model(Model(name="unet-tiny", weights=str(tmp_path)), OTHERS)
    assert "new in this model: segmentation_head." in caplog.text
    changed = {n for (n, a), b in zip(first.named_parameters(), other.parameters(), strict=True) if not a.equal(b)}
    assert changed == {"net.segmentation_head.0.weight"}  # its bias begins at 0


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    make().save(tmp_path, None)
    with pytest.raises(InputError, match="is of Unet, which is no deeplabv3plus"):
        make("deeplabv3plus", str(tmp_path))
    with pytest.raises(InputError, match=r"model\.encoder: received resnet18, but .* has tu-test_resnet"):
        make(weights=str(tmp_path), encoder="resnet18")
    with pytest.raises(InputError, match=r"model\.weights: .*/nothing can't be loaded"):
        make(weights=str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="can't be loaded"):
        make(weights=str(tmp_path))


def test_imagenet_weights_that_can_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", fail)
    with pytest.raises(InputError, match=r"model\.weights: imagenet: can't be downloaded for the encoder resnet34"):
        make("unet", "imagenet")


def test_encoders_are_found_by_smp_and_timm() -> None:
    assert [find_encoder(name) for name in ("resnet34", SMALL, f"tu-{SMALL}")] == [
        "resnet34",
        f"tu-{SMALL}",
        f"tu-{SMALL}",
    ]
    with pytest.raises(InputError, match=r"model\.encoder: received resnet43, .* near to it: .*resnet34"):
        find_encoder("resnet43")
    with pytest.raises(InputError, match="swin_tiny_patch4_window7_224 can't be used for unet"):
        make("unet", encoder="swin_tiny_patch4_window7_224")
    with pytest.raises(InputError, match="can't be used for deeplabv3plus"):
        make("deeplabv3plus", encoder="vgg11")


def test_parameters_that_are_not_used_are_frozen() -> None:
    frozen = [name for name, p in make("unet", encoder="efficientnet-b0").named_parameters() if not p.requires_grad]
    assert frozen == ["net.encoder._conv_head.weight", "net.encoder._bn1.weight", "net.encoder._bn1.bias"]


def test_an_encoder_is_refused_where_there_is_no_choice(tmp_path: Path) -> None:
    model = "model={name: segformer-tiny, weights: null, encoder: resnet18}"
    message = (
        r"model\.encoder: .*segformer-tiny has its own; leave it out, or take one of unet, unet-tiny, deeplabv3plus"
    )
    with pytest.raises(JobError, match=message):
        example_job(str(tmp_path), "x", model)
    job = example_job(str(tmp_path), "x", "model={name: unet, weights: null, encoder: resnet18}")
    assert job.schedule.decay == "cosine"
