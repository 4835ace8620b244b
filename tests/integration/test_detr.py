"""DETR: transformers' files and weights, what is frozen, and the net from scratch."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageSegmentation
from transformers.models.detr.configuration_detr import DetrConfig
from transformers.models.detr.modeling_detr import (
    DetrForObjectDetection,
    DetrForSegmentation,
    DetrFrozenBatchNorm2d,
)

from raysseg import config, storage
from raysseg.catalogue import MODELS
from raysseg.config import Inference, Model
from raysseg.loop import build_optimizer
from raysseg.masks import MaskSet
from raysseg.models import Targets, build_model
from raysseg.models.base import Regions
from raysseg.models.detr import SIZES, Detr
from raysseg.schema import ClassMap, InputError

CLASSES = ClassMap((3, 5, 6), ("road", "car", "dog"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)), (False, True, True))
TINY = Model(name="detr-tiny", weights=None)


def built(model: Model = TINY, classes: ClassMap = CLASSES, seed: int = 1) -> Detr:
    torch.manual_seed(seed)
    found = build_model(model, classes, "panoptic")
    assert isinstance(found, Detr)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DETR as it lies in a bundle."""
    folder = tmp_path_factory.mktemp("saved")
    built().save(folder, None)
    return folder


def pixels(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_job_names_every_model() -> None:
    assert set(SIZES) == {name for name, entry in MODELS.items() if entry.family == "detr"}


def test_transformers_reads_what_is_saved_and_gives_the_same(saved: Path) -> None:
    """No code of ours: the processor's pixels, the net's outputs and the processor's segments."""
    image = pixels(64, 96, 3).numpy()
    processor = AutoImageProcessor.from_pretrained(saved, backend="pil")
    net = AutoModelForImageSegmentation.from_pretrained(saved).eval()
    assert isinstance(net, DetrForSegmentation)
    assert net.config.id2label == dict(enumerate(CLASSES.names))
    model = built().eval()
    with torch.inference_mode():
        theirs = net(**processor(image, return_tensors="pt"))
        ours = model(torch.from_numpy(image).permute(2, 0, 1)[None])
        again = net(pixel_values=model.normalise(torch.from_numpy(image).permute(2, 0, 1)[None]))
    names = {"class_logits": "logits", "mask_logits": "pred_masks", "boxes": "pred_boxes"}
    for name, theirs_name in names.items():
        torch.testing.assert_close(again[theirs_name], ours.values[name], rtol=0, atol=0)
        torch.testing.assert_close(theirs[theirs_name], ours.values[name], rtol=1e-4, atol=1e-4)
    (found,) = processor.post_process_panoptic_segmentation(theirs, threshold=0.0, target_sizes=[(64, 96)])
    assert found["segmentation"].shape == (64, 96)


def test_images_are_resized_as_the_bundle_says(tmp_path: Path) -> None:
    built().save(tmp_path, (64, 80))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    found = processor(pixels(50, 60, 3).numpy(), return_tensors="pt")
    assert found["pixel_values"].shape == (1, 3, 64, 80)
    assert found["pixel_mask"].all()


def test_same_classes_keep_the_head(saved: Path) -> None:
    again = built(Model(name="detr-tiny", weights=str(saved)), seed=2).state_dict()
    for name, tensor in built().state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_other_classes_get_a_new_head_and_it_is_said(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = ClassMap((0, 1), ("sky", "tree"), ((1, 1, 1), (2, 2, 2)), (False, True))
    with caplog.at_level(logging.INFO, logger="raysseg"):
        again = built(Model(name="detr-tiny", weights=str(saved)), others, seed=2).state_dict()
    assert "new in this model: detr.class_labels_classifier.bias, detr.class_labels_classifier.weight" in caplog.text
    assert again["net.detr.class_labels_classifier.weight"].shape[0] == 3
    for name, tensor in built().state_dict().items():
        if "class_labels_classifier" not in name:
            assert torch.equal(again[name], tensor), name


def test_weights_from_s3(saved: Path, s3_bucket: str) -> None:
    for path in saved.iterdir():
        storage.write_bytes(f"{s3_bucket}/weights/{path.name}", path.read_bytes())
    model = built(Model(name="detr-tiny", weights=f"{s3_bucket}/weights"), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), built().parameters(), strict=True))


OLD_NAMES = [
    ("detr.model.backbone.", "detr.model.backbone.conv_encoder."),
    (".o_proj.", ".out_proj."),
    (".mlp.fc", ".fc"),
    ("bbox_attention.q_proj", "bbox_attention.q_linear"),
    ("bbox_attention.k_proj", "bbox_attention.k_linear"),
    ("mask_head.conv1.conv", "mask_head.lay1"),
    ("mask_head.conv1.norm", "mask_head.gn1"),
    ("mask_head.conv2.conv", "mask_head.lay2"),
    ("mask_head.conv2.norm", "mask_head.gn2"),
    ("mask_head.output_conv", "mask_head.out_lay"),
    *((f"mask_head.fpn_stages.{i}.fpn_adapter", f"mask_head.adapter{i + 1}") for i in range(3)),
    *((f"mask_head.fpn_stages.{i}.refine.conv", f"mask_head.lay{i + 3}") for i in range(3)),
    *((f"mask_head.fpn_stages.{i}.refine.norm", f"mask_head.gn{i + 3}") for i in range(3)),
]


def as_on_the_hub(folder: Path, model: Detr, architecture: str) -> Path:
    """Files as facebook/detr-resnet-50 and -panoptic have them: older names, the backbone by its name alone."""
    state = {name.removeprefix("net."): tensor for name, tensor in model.state_dict().items()}
    for new, old in OLD_NAMES:
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    if architecture == "DetrForObjectDetection":
        state = {name.removeprefix("detr."): t for name, t in state.items() if name.startswith("detr.")}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    backbone, is_dilated, sizes = SIZES["detr-tiny"]
    settings = {
        "architectures": [architecture],
        "model_type": "detr",
        "use_timm_backbone": True,
        "use_pretrained_backbone": True,
        "backbone": backbone,
        "backbone_config": None,
        "dilation": is_dilated,
        "id2label": dict(enumerate(CLASSES.names)),
        "label2id": {name: i for i, name in enumerate(CLASSES.names)},
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_weights_of_the_hubs_panoptic_models_load(tmp_path: Path) -> None:
    folder = as_on_the_hub(tmp_path, built(), "DetrForSegmentation")
    model = built(Model(name="detr-tiny", weights=str(folder)), seed=2)
    for name, tensor in built().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_weights_of_the_hubs_detectors_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = as_on_the_hub(tmp_path, built(), "DetrForObjectDetection")
    with caplog.at_level(logging.INFO, logger="raysseg"):
        model = built(Model(name="detr-tiny", weights=str(folder)), seed=2)
    state = model.state_dict()
    for name, tensor in built().state_dict().items():
        if name.startswith("net.detr."):
            assert torch.equal(state[name], tensor), name
    assert "not used: none" in caplog.text
    assert "mask head" in caplog.text
    mask_head = state["net.mask_head.conv1.conv.weight"]
    assert mask_head.std() > 0.01


def test_detectors_saved_now_load(tmp_path: Path) -> None:
    model = built()
    model.net.detr.save_pretrained(tmp_path)
    assert isinstance(DetrForObjectDetection.from_pretrained(tmp_path), DetrForObjectDetection)
    again = built(Model(name="detr-tiny", weights=str(tmp_path)), seed=2)
    pairs = zip(again.net.detr.parameters(), model.net.detr.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize(("name", "message"), [("detr-resnet-50", "which is no detr-resnet-50")])
def test_weights_of_another_model_are_refused(saved: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(Model(name=name, weights=str(saved)), CLASSES, "panoptic")
    with pytest.raises(InputError, match="is a detr model"):
        build_model(Model(name="segformer-tiny", weights=str(saved)), CLASSES)


def test_what_trains(saved: Path) -> None:
    """With weights, the stem and the first stage are frozen; from scratch, nothing is but the statistics."""
    scratch, tuned = built(), built(Model(name="detr-tiny", weights=str(saved)))
    assert all(p.requires_grad for p in scratch.parameters())
    frozen = {name for name, p in tuned.named_parameters() if not p.requires_grad}
    backbone = "net.detr.model.backbone.model."
    assert frozen == {
        name for name, _ in tuned.named_parameters() if name.startswith((f"{backbone}conv1", f"{backbone}layer1"))
    }
    assert len(frozen) > 3
    norms = [type(m) for m in tuned.modules() if "BatchNorm" in type(m).__name__]
    assert set(norms) == {DetrFrozenBatchNorm2d}
    settings = config.Optimizer(lr=1.0, backbone_lr_factor=0.1, head_lr_factor=10)
    rates = {id(p): group["lr"] for group in build_optimizer(tuned, settings).param_groups for p in group["params"]}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            is_head = name.startswith(tuned.head_prefixes)
            assert rates[id(parameter)] == (0.1 if name.startswith(backbone) else 10 if is_head else 1), name


def test_every_weight_of_the_backbone_learns_from_scratch() -> None:
    model = built().train()
    labels = torch.full((1, 64, 64), CLASSES.nothing)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, :32], masks[1, 40:, 20:50] = True, True
    targets = Targets(labels, torch.ones(1), torch.arange(1), (Regions(masks, torch.tensor([0, 1])),))
    losses = model(pixels(1, 3, 64, 64), targets).losses
    assert set(losses) == {"classes", "masks", "dice", "l1", "giou"}
    torch.stack(list(losses.values())).sum().backward()
    silent = [name for name, p in model.named_parameters() if not p.grad.any()]  # type: ignore[union-attr]
    # the first layer's queries are 0 yet: their attention to each other is without effect, in every DETR
    assert all(name.startswith("net.detr.model.decoder.layers.0.self_attn") for name in silent)


def test_dc5_sees_twice_as_finely() -> None:
    backbones = {}
    for name in ("detr-resnet-50", "detr-resnet-50-dc5"):
        backbone, is_dilated, _ = SIZES[name]
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64}
        with torch.device("meta"):
            net = DetrForSegmentation(DetrConfig(backbone=backbone, dilation=is_dilated, **sizes))
            found = net.detr.model.backbone.model(torch.zeros(1, 3, 128, 192))
        backbones[name] = (
            [tuple(x.shape) for x in found.feature_maps if x is not None]
            if hasattr(found, "feature_maps")
            else [tuple(x.shape) for x in found]
        )
    assert backbones["detr-resnet-50"][-1] == (1, 2048, 4, 6)
    assert backbones["detr-resnet-50-dc5"][-1] == (1, 2048, 8, 12)


def test_more_regions_than_queries_are_cut_and_many_classes_fit() -> None:
    classes = ClassMap(tuple(range(300)), tuple(f"c{i}" for i in range(300)), ((0, 0, 0),) * 300, (True,) * 300)
    torch.manual_seed(0)
    model = build_model(TINY, classes, "instance")
    masks = torch.zeros(40, 64, 64, dtype=torch.bool)
    for i in range(40):
        masks[i, i, : i + 1] = True
    labels = torch.full((1, 64, 64), classes.nothing)
    targets = Targets(labels, torch.ones(1), torch.arange(1), (Regions(masks, torch.arange(40)),))
    assert float(model.normalisers(targets)["regions"]) == model.net.config.num_queries == 20
    losses = model(pixels(1, 3, 64, 64), targets).losses
    assert torch.stack(list(losses.values())).isfinite().all()
    (found,) = model.eval().decode(model(pixels(1, 3, 64, 64)), [(33, 50)], Inference())
    assert isinstance(found, MaskSet)
    assert len(found) <= 100
    assert (np.diff(found.scores) <= 0).all()  # type: ignore[arg-type]
