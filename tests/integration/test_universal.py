"""Mask2Former and EoMT: against transformers' own forward and loading; weights of other classes; annealing."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    EomtForUniversalSegmentation,
    Mask2FormerForUniversalSegmentation,
    SwinForImageClassification,
)

from raysseg.catalogue import MODELS
from raysseg.config import Inference, Model
from raysseg.models import Regions, Targets, build_model
from raysseg.models.eomt import mask_share, predict_layers
from raysseg.models.universal import CONFIGS, NETS, Universal
from raysseg.schema import ClassMap, InputError, Task

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


@pytest.fixture(params=TINY)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Universal]:
    """A tiny net as transformers saves it."""
    model = built(request.param, seed=1)
    model.save(tmp_path, None)
    return request.param, tmp_path, model


def read(name: str, folder: Path, classes: ClassMap = CLASSES) -> Universal:
    model = build_model(Model(name=name, weights=str(folder)), classes, "instance")
    assert isinstance(model, Universal)
    return model


def same(first: Universal, second: Universal, without: str = "nothing") -> bool:
    theirs = second.state_dict()
    return all(torch.equal(t, theirs[key]) for key, t in first.state_dict().items() if without not in key)


def test_weights_of_the_same_classes_keep_the_head(saved: tuple[str, Path, Universal]) -> None:
    name, folder, model = saved
    assert same(model, read(name, folder))


@pytest.mark.parametrize("names", [("sky", "sea"), ("sky", "sea", "sun")])
def test_weights_of_other_classes_get_a_new_head_and_it_is_said(
    saved: tuple[str, Path, Universal], names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    name, folder, model = saved
    number = len(names)
    others = ClassMap(tuple(range(number)), names, ((1, 1, 1),) * number, (True,) * number)
    with caplog.at_level(logging.INFO, logger="raysseg"):
        found = read(name, folder, others)
    assert "class_predictor.bias, class_predictor.weight" in caplog.text.split("new in this model:")[1]
    assert found.net.class_predictor.out_features == number + 1
    assert (found.net.class_predictor.bias == 0).all()
    found.criterion = model.criterion
    found.net.criterion = model.net.criterion
    assert same(model, found, without="class_predictor")
    assert list(found.net.config.id2label.values()) == list(names)


def test_weights_of_another_size_or_model_are_refused(saved: tuple[str, Path, Universal]) -> None:
    name, folder, _ = saved
    larger, other = {
        "mask2former-tiny": ("mask2former-swin-tiny", "eomt-tiny"),
        "eomt-tiny": ("eomt-large", "mask2former-tiny"),
    }[name]
    with pytest.raises(InputError, match=f"which is no {larger}"):
        read(larger, folder)
    with pytest.raises(InputError, match="give weights of a"):
        read(other, folder)


def test_checkpoints_with_the_names_of_old_are_read(tmp_path: Path) -> None:
    """As published: Swin's layers had other names before transformers 5."""
    model = built("mask2former-tiny", seed=1)
    model.save(tmp_path, None)
    renamed = {}
    for key, tensor in model.net.state_dict().items():
        for new, old in {
            "encoder.swin.encoder.": "encoder.encoder.",
            "encoder.swin.embeddings.": "encoder.embeddings.",
            "attention.q_proj": "attention.self.query",
            "attention.k_proj": "attention.self.key",
            "attention.v_proj": "attention.self.value",
            "attention.o_proj": "attention.output.dense",
            "attention.relative_position_bias.relative": "attention.self.relative",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        }.items():
            if "pixel_level_module.encoder" in key:
                key = key.replace(new, old)
        renamed[key] = tensor.clone()
    assert sum("attention.self.query" in key for key in renamed) == 8  # a weight and a bias in four layers
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(model, read("mask2former-tiny", tmp_path), without="swin.layernorm")


def test_a_backbone_alone_may_have_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As of a classifier on ImageNet."""
    torch.manual_seed(3)
    classifier = SwinForImageClassification(CONFIGS["mask2former-tiny"]().backbone_config)
    classifier.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="raysseg"):
        model = read("mask2former-tiny", tmp_path)
    assert "not used: classifier.bias, classifier.weight" in caplog.text
    theirs, compared = classifier.state_dict(), 0
    for key, tensor in model.net.model.pixel_level_module.encoder.state_dict().items():
        if key in theirs and "swin.layernorm" not in key:
            assert torch.equal(tensor, theirs[key]), key
            compared += 1
    assert compared > 50
    with pytest.raises(InputError, match="which is no mask2former-swin-tiny"):
        read("mask2former-swin-tiny", tmp_path)


@pytest.mark.parametrize("name", TINY)
def test_images_of_any_size_come_out_at_theirs(name: str) -> None:
    """Scaled up to whole strides, masks cover the whole image."""
    model = built(name).eval()
    with torch.inference_mode():
        odd = model(pictures(65, 97)).values["mask_logits"]
        stride = 16 if "mask2former" in name else 8
        assert tuple(odd.shape[2:]) == tuple(-(-side // stride) * stride // 2 for side in (65, 97))
        (view,) = model.decode(model(pictures(65, 97, rows=1)), [(33, 50)], Inference())
    assert np.shape(view.numbers) == (33, 50)


def test_only_what_nothing_uses_is_frozen() -> None:
    model = built("mask2former-tiny")
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"net.model.pixel_level_module.encoder.swin.layernorm.{part}" for part in ("weight", "bias")]
    assert all(p.requires_grad for p in built("eomt-tiny").parameters())
    with torch.device("meta"):
        resnet = Universal(Mask2FormerForUniversalSegmentation(CONFIGS["mask2former-resnet-50"]()), CLASSES, "panoptic")
    assert all(p.requires_grad for p in resnet.parameters())


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
