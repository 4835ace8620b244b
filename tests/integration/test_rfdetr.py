"""RF-DETR: against transformers' own forward, loss, processor and files; windows, sizes, weights of other classes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation, RfDetrForInstanceSegmentation
from transformers.loss import loss_rf_detr

from raysseg import storage
from raysseg.catalogue import MODELS
from raysseg.config import Inference, Model
from raysseg.masks import MaskSet
from raysseg.models import Regions, Targets, build_model, queries
from raysseg.models.rfdetr import CONFIGS, PRIOR, RfDetr
from raysseg.schema import ClassMap, InputError

CLASSES = ClassMap((3, 5, 7), ("cat", "car", "dog"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)), (True, True, True))
OTHERS = ClassMap((0, 1), ("ant", "bee"), ((1, 1, 1), (2, 2, 2)), (True, True))
TINY = Model(name="rfdetr-tiny", weights=None)
HEADS = ("net.model.class_embed.", "net.model.model.enc_out_class_embed.")


def built(model: Model = TINY, classes: ClassMap = CLASSES, seed: int = 1) -> RfDetr:
    torch.manual_seed(seed)
    found = build_model(model, classes, "instance")
    assert isinstance(found, RfDetr)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RF-DETR as it lies in a bundle."""
    folder = tmp_path_factory.mktemp("saved")
    built().save(folder, None)
    return folder


def pictures(*size: int, rows: int = 2) -> Tensor:
    return torch.randint(0, 256, (rows, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def make_targets(size: tuple[int, int]) -> Targets:
    """Rectangles whose edges lie on even pixels; the second image has more of them."""
    rng = np.random.default_rng(0)
    regions = []
    for num in (2, 4):
        masks = torch.zeros(num, *size, dtype=torch.bool)
        for mask in masks:
            y, x = 2 * rng.integers(0, size[0] // 4, 2)
            mask[y : y + 2 * rng.integers(4, size[0] // 4), x : x + 2 * rng.integers(4, size[1] // 4)] = True
        regions.append(Regions(masks, torch.from_numpy(rng.integers(0, 3, num))))
    return Targets(torch.full((2, *size), CLASSES.nothing), torch.ones(2), torch.arange(2), tuple(regions))


def test_the_job_names_every_model() -> None:
    assert set(CONFIGS) == {name for name, entry in MODELS.items() if entry.family == "rfdetr"}


@pytest.mark.parametrize(
    ("size", "millions"),
    [("nano", 33.6), ("small", 33.7), ("medium", 35.7), ("large", 36.2), ("xlarge", 38.1), ("2xlarge", 38.6)],
)
def test_sizes_are_the_authors(size: str, millions: float) -> None:
    """Their table's, for the 91 numbers that COCO's classes have."""
    config = CONFIGS[f"rfdetr-seg-{size}"]()
    config.num_labels = 91
    with torch.device("meta"):
        net = RfDetrForInstanceSegmentation(config)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_outputs_are_those_of_transformers() -> None:
    model = built().eval()
    images = pictures(96, 96)
    torch.manual_seed(1)
    theirs = RfDetrForInstanceSegmentation(model.net.config).eval()
    theirs.load_state_dict(model.net.state_dict())
    with torch.inference_mode():
        ours, expected = model(images).values, theirs(pixel_values=model.normalise(images))
    names = {"class_logits": "logits", "mask_logits": "pred_masks", "boxes": "pred_boxes"}
    for name, their_name in names.items():
        torch.testing.assert_close(ours[name], expected[their_name], rtol=1e-5, atol=1e-5)
    assert ours["mask_logits"].shape == (2, 40, 48, 48)


def test_the_loss_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all groups, layers and the first stage, and every place of a mask for its points."""
    side = 48
    axis = (torch.arange(side) + 0.5) / side
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    model = built().train()
    targets, images = make_targets((96, 96)), pictures(96, 96)
    monkeypatch.setattr(queries, "OVERSAMPLING", 1)
    monkeypatch.setattr(queries, "IMPORTANCE", 1.0)
    monkeypatch.setattr(queries, "_draw_points", lambda seeds, num: grid.expand(len(seeds), -1, -1))
    config = model.net.config
    config.mask_point_sample_ratio = 1
    model = RfDetr(model.net, CLASSES, "instance").train()
    found = model(images, targets).losses
    assert targets.regions is not None
    labels = []
    for regions in targets.regions:
        corners = regions.boxes / 96
        boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
        labels.append({"class_labels": regions.class_ids, "masks": regions.masks, "boxes": boxes})
    monkeypatch.setattr(
        loss_rf_detr, "sample_points_using_uncertainty", lambda logits, *_: grid.expand(len(logits), -1, -1)
    )
    monkeypatch.setattr(torch, "rand", lambda *_, **__: grid[None])  # where their matching looks
    expected = model.net(pixel_values=model.normalise(images), labels=labels)
    for name, their_name, factor in (
        ("classes", "loss_ce", 1),
        ("masks", "loss_mask_ce", 5),
        ("dice", "loss_mask_dice", 5),
        ("l1", "loss_bbox", 5),
        ("giou", "loss_giou", 2),
    ):
        theirs = sum(factor * expected.loss_dict[f"{their_name}{end}"] for end in ("", "_0", "_enc"))
        torch.testing.assert_close(found[name], theirs, check_dtype=False, rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(sum(found.values()), expected.loss, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_windows_keep_their_places_in_images_that_are_not_square() -> None:
    """Each patch's token comes back to where it was; in square images as transformers cuts them."""
    backbone = built().net.model.model.backbone.backbone
    tokens = torch.arange(1 + 8 * 12).float().view(1, -1, 1).repeat(2, 1, 1)
    windows = backbone.embeddings.window_partition(tokens, 64, 96)
    assert windows.shape == (2 * 4, 1 + 4 * 6, 1)
    assert (windows[:, 0] == 0).all()
    assert windows[1, 1:7, 0].tolist() == [7, 8, 9, 10, 11, 12]  # the right half of the first row
    assert (backbone.window_unpartition(windows[:, 1:], 64, 96).flatten() == tokens[:, 1:].flatten()).all()
    square = torch.randn(2, 1 + 8 * 8, 3)
    theirs = type(backbone.embeddings).window_partition(backbone.embeddings, square, 64, 64)
    ours = backbone.embeddings.window_partition(square, 64, 64)
    assert (ours[:, 1:] == theirs[:, 1:]).all()


@pytest.mark.parametrize("size", [(9, 17), (30, 300), (97, 131)])
def test_images_of_any_size_have_a_place_a_query(size: tuple[int, int]) -> None:
    model = built().eval()
    with torch.inference_mode():
        (found,) = model.decode(model(pictures(*size, rows=1)), [size], Inference())
    assert isinstance(found, MaskSet)
    assert found.size == size
    assert len(found) > 0


def test_transformers_reads_what_is_saved_and_gives_the_same(saved: Path) -> None:
    """No code of ours: the processor's pixels, the net's outputs and the processor's instances."""
    image = pictures(96, 96, rows=1)
    processor = AutoImageProcessor.from_pretrained(saved)
    net = AutoModelForInstanceSegmentation.from_pretrained(saved).eval()
    assert isinstance(net, RfDetrForInstanceSegmentation)
    assert net.config.id2label == dict(enumerate(CLASSES.names))
    model = built().eval()
    with torch.inference_mode():
        theirs = net(**processor(image[0], return_tensors="pt"))
        ours = model(image)
    torch.testing.assert_close(theirs.logits, ours.values["class_logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.pred_masks, ours.values["mask_logits"], rtol=1e-4, atol=1e-4)
    (expected,) = processor.post_process_instance_segmentation(
        theirs, threshold=0.0, target_sizes=[(60, 90)], return_binary_maps=True
    )
    (found,) = model.decode(ours, [(60, 90)], Inference(max_instances=40))
    assert isinstance(found, MaskSet)
    assert found.scores == pytest.approx([row["score"] for row in expected["segments_info"]], abs=1e-5)
    assert found.class_ids.tolist() == [row["label_id"] for row in expected["segments_info"]]
    assert (found.masks == expected["segmentation"].numpy()).mean() > 0.999


def test_same_classes_keep_the_heads(saved: Path) -> None:
    again = built(Model(name="rfdetr-tiny", weights=str(saved)), seed=2).state_dict()
    for name, tensor in built().state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("classes", [OTHERS, ClassMap((0, 1, 2), ("x", "y", "z"), OTHERS.colours * 2, (True,) * 3)])
def test_other_classes_get_new_heads_and_it_is_said(
    saved: Path, caplog: pytest.LogCaptureFixture, classes: ClassMap
) -> None:
    with caplog.at_level(logging.INFO, logger="raysseg"):
        again = built(Model(name="rfdetr-tiny", weights=str(saved)), classes, seed=2).state_dict()
    assert "model.class_embed.weight" in caplog.text
    for name, tensor in built().state_dict().items():
        if not name.startswith(HEADS):
            assert torch.equal(again[name], tensor), name
        elif name.endswith("bias"):
            assert again[name].tolist() == pytest.approx([PRIOR] * len(classes))
        else:
            assert len(again[name]) == len(classes)
            assert not torch.isin(again[name], tensor).any(), name


def test_weights_from_s3(saved: Path, s3_bucket: str) -> None:
    for path in saved.iterdir():
        storage.write_bytes(f"{s3_bucket}/weights/{path.name}", path.read_bytes())
    model = built(Model(name="rfdetr-tiny", weights=f"{s3_bucket}/weights"), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), built().parameters(), strict=True))


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    with pytest.raises(InputError, match=r"hidden_size 96, .* which is no rfdetr-seg-nano"):
        build_model(Model(name="rfdetr-seg-nano", weights=str(saved)), CLASSES, "instance")
    with pytest.raises(InputError, match="is a rf_detr model"):
        build_model(Model(name="segformer-tiny", weights=str(saved)), CLASSES)
