"""Mask2Former and EoMT: against transformers' own forward and loading; weights of other classes; annealing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, EomtForUniversalSegmentation, Mask2FormerForUniversalSegmentation

from raysseg.catalogue import MODELS
from raysseg.config import Inference, Model
from raysseg.models import Regions, Targets, build_model
from raysseg.models.eomt import mask_share, predict_layers
from raysseg.models.universal import CONFIGS, NETS, Universal
from raysseg.schema import ClassMap, Task

CLASSES = ClassMap((3, 5, 7), ("road", "car", "tree"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)), (False, True, True))
TINY = ("mask2former-tiny", "eomt-tiny")


def built(name: str, task: Task = "panoptic", seed: int = 0, classes: ClassMap = CLASSES) -> Universal:
    torch.manual_seed(seed)
    model = build_model(Model(name=name, weights=None), classes, task)
    assert isinstance(model, Universal)
    return model


def pictures(*size: int, rows: int = 2) -> Tensor:
    return torch.randint(0, 256, (rows, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def targets_of(rows: int, size: tuple[int, int], seeds: list[int]) -> Targets:
    labels = torch.zeros(rows, *size, dtype=torch.int64)
    labels[:, 10:40, 10:40] = 1
    regions = Regions(torch.stack([labels[0] == 0, labels[0] == 1]), torch.tensor([0, 1]))
    return Targets(labels, torch.ones(rows), torch.tensor(seeds), (regions,) * rows)


def test_the_job_names_every_model() -> None:
    assert set(CONFIGS) == {name for name, entry in MODELS.items() if entry.family == "universal"}


@pytest.mark.parametrize(
    ("name", "millions"), [("mask2former-swin-tiny", 47), ("mask2former-resnet-50", 44), ("eomt-small", 24)]
)
def test_sizes_are_the_papers(name: str, millions: int) -> None:
    config = CONFIGS[name]()
    config.num_labels = 133
    with torch.device("meta"):
        net = NETS[config.model_type](config)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_eomt_agrees_with_transformers_at_the_configured_size(share: float) -> None:
    net = built("eomt-tiny").net.eval()
    net.attn_mask_probs.fill_(share)
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = net(pixel_values=pixels)
        ours = predict_layers(net, pixels, [share, share], is_last_enough=True)
    assert len(ours) == (3 if share else 1)
    torch.testing.assert_close(ours[-1].mask_logits, theirs.masks_queries_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[-1].class_logits, theirs.class_queries_logits, rtol=1e-5, atol=1e-5)


def test_masked_attention_draws_lots_by_the_image_alone() -> None:
    model = built("eomt-tiny").train()
    model.set_progress(0.4)
    assert 0 < model._mask_shares[0] < 1
    images, seeds = pictures(64, 96), [11, 12]
    with torch.no_grad():
        both = model(images, targets_of(2, (64, 96), seeds)).values
        second = model(images[1:], targets_of(1, (64, 96), seeds[1:])).values
        other = model(images[1:], targets_of(1, (64, 96), [13])).values
    torch.testing.assert_close(second["mask_logits"][0], both["mask_logits"][1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other["mask_logits"], second["mask_logits"], rtol=1e-4, atol=1e-4)


def test_masked_attention_is_annealed_as_the_authors_do() -> None:
    """COCO in configs/coco/panoptic/eomt_large_640: from steps 14782, 29564, 44346, 59128 of 12 x 7391 on."""
    for block, (start, stop) in enumerate([(14782, 29564), (29564, 44346), (44346, 59128), (59128, 73910)]):
        for step in range(0, 88692, 2000):
            expected = 1 - min(max((step - start) / (stop - start), 0), 1)
            assert mask_share(step / 88692, block, 4) == pytest.approx(expected**0.9)


def test_weights_that_do_without_masks_stay_so() -> None:
    net = built("eomt-tiny").net
    net.attn_mask_probs.zero_()
    model = Universal(net, CLASSES, "panoptic")
    model.set_progress(0.0)
    assert model._mask_shares == [0.0, 0.0]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_transformers_loads_what_is_saved(name: str, task: Task, tmp_path: Path) -> None:
    """Its processor and net, with no code of ours, give the same as the model with the pixels of that processor."""
    model = built(name, task).eval()
    model.save(tmp_path, (128, 128))
    kind = Mask2FormerForUniversalSegmentation if "mask2former" in name else EomtForUniversalSegmentation
    net = kind.from_pretrained(tmp_path).eval()
    assert net.config.id2label == {0: "road", 1: "car", 2: "tree"}
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    images = pictures(128, 128)
    pixels = processor(images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        theirs, ours = net(pixel_values=pixels), model(images).values
    torch.testing.assert_close(ours["class_logits"], theirs.class_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["mask_logits"], theirs.masks_queries_logits, rtol=1e-4, atol=1e-4)
    if task == "semantic":
        scores = model.class_scores(model(images), (128, 128))
        shown = processor.post_process_semantic_segmentation(theirs, target_sizes=[(128, 128)] * 2)
        agreement = (scores.argmax(1) == torch.stack(shown)).float().mean()
        assert agreement > 0.99  # transformers scales the masks twice


@pytest.mark.parametrize("name", TINY)
def test_images_of_any_size_come_out_at_theirs(name: str) -> None:
    """Scaled up to whole strides, masks cover the whole image."""
    model = built(name).eval()
    with torch.inference_mode():
        odd = model(pictures(65, 97)).values["mask_logits"]
        stride = 32 if "mask2former" in name else 8
        assert tuple(odd.shape[2:]) == tuple(-(-side // stride) * stride // 4 for side in (65, 97))
        (view,) = model.decode(model(pictures(65, 97, rows=1)), [(33, 50)], Inference())
    assert np.shape(view.numbers) == (33, 50)


def test_only_what_nothing_uses_is_frozen() -> None:
    model = built("mask2former-tiny")
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"net.model.pixel_level_module.encoder.swin.layernorm.{part}" for part in ("weight", "bias")]
    for name in ("eomt-tiny", "mask2former-resnet-50"):
        assert all(p.requires_grad for p in built(name).parameters())


def test_the_backbone_has_its_own_rate() -> None:
    for name, inside in {
        "mask2former-tiny": "net.model.pixel_level_module.encoder.swin.embeddings.norm.weight",
        "eomt-tiny": "net.layers.1.norm1.weight",
    }.items():
        model = built(name)
        slow = {key for key, _ in model.named_parameters() if key.startswith(model.backbone_prefixes)}
        assert inside in slow
        assert not any(key.startswith(("net.layers.2.", "net.layers.3.", "net.query", "net.class")) for key in slow)
        assert not any(".decoder." in key or ".transformer_module." in key for key in slow)
