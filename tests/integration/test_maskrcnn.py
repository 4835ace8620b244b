"""Mask R-CNN: torchvision's own numbers, ignored pixels, images of several sizes, weights from folders and S3."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from raysseg import storage
from raysseg.catalogue import MODELS
from raysseg.config import Inference, JobError, Model
from raysseg.masks import MaskSet
from raysseg.models import Outputs, Regions, Targets, build_model, load_model
from raysseg.models.maskrcnn import SHAPES, MaskRcnn, _is_ignored, build_net
from raysseg.predictor import predict
from raysseg.schema import ClassMap, InputError
from tests.conftest import example_job

torch.set_num_threads(1)


def make_classes(num: int) -> ClassMap:
    return ClassMap(tuple(range(1, num + 1)), tuple(f"c{i}" for i in range(num)), ((0, 0, 0),) * num, (True,) * num)


CLASSES = make_classes(3)


def make(weights: str | None = None, classes: ClassMap = CLASSES, name: str = "maskrcnn-tiny") -> MaskRcnn:
    torch.manual_seed(0)
    model = build_model(Model(name=name, weights=weights), classes, "instance")
    assert isinstance(model, MaskRcnn)
    return model


def draw(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def make_targets(num: int, num_regions: int, size: tuple[int, int] = (64, 96), ignore: int = 255) -> Targets:
    """Images that each hold some rectangles, of class 0, 1, ...; the last image is ignored to the right of 64."""
    labels = torch.full((num, *size), ignore - 1)
    masks = torch.zeros((num_regions, *size), dtype=torch.bool)
    for i in range(num_regions):
        masks[i, 8 : 8 + 12 * (i + 1), 16 * i : 16 * i + 14] = True
        labels[:, masks[i]] = i
    labels[-1, :, 64:] = ignore
    regions = Regions(masks, torch.arange(num_regions))
    return Targets(labels, torch.ones(num), torch.zeros(num, dtype=torch.int64), (regions,) * num)


def losses_of(model: MaskRcnn, images: list[Tensor], targets: Targets) -> dict[str, Tensor]:
    torch.manual_seed(3)
    found: dict[str, Tensor] = model.train()(torch.stack(images), targets).losses
    return found


def gradients_of(model: MaskRcnn, losses: dict[str, Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    sum(losses.values(), torch.zeros(())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_the_job_names_every_model() -> None:
    assert set(SHAPES) == {name for name, entry in MODELS.items() if entry.family == "maskrcnn"}


# --- torchvision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maskrcnn-resnet50-fpn", "maskrcnn-resnet50-fpn-v2"])
def test_parameters_are_torchvisions(name: str) -> None:
    theirs = getattr(detection, name.replace("-", "_"))
    with torch.device("meta"):
        ours = build_net(SHAPES[name], 90, is_pretrained=False)
        reference = theirs(weights=None, weights_backbone=None)
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


def test_detections_are_torchvisions() -> None:
    """The same parts in torchvision's own MaskRCNN.forward, whose transform is told to leave sizes alone."""
    model = make().eval()
    with torch.no_grad():  # so that there is something to be seen
        nn.init.normal_(model.net.roi_heads.box_predictor.cls_score.weight, std=0.5)
        nn.init.normal_(model.net.rpn.head.cls_logits.weight, std=0.5)
    images = draw((64, 96), (96, 128))
    size = (80, 100)
    found = model.decode(model(images), [(64, 96), size], Inference())
    transform = model.net.transform
    transform.image_mean, transform.image_std = (0.0,) * 3, (1.0,) * 3
    for image, view in zip(images[:1], found[:1], strict=True):
        transform.min_size, transform.max_size = (min(image.shape[1:]),), max(image.shape[1:])
        alone = model.decode(model([image]), [(64, 96)], Inference())[0]
        with torch.no_grad():
            theirs = model.net([model.normalise(image[None])[0]])[0]
        shown = (theirs["masks"][:, 0] >= 0.5).flatten(1).any(1)
        assert isinstance(alone, MaskSet)
        assert isinstance(view, MaskSet)
        assert len(alone) == int(shown.sum()) > 5
        np.testing.assert_allclose(alone.scores, theirs["scores"][shown].numpy(), atol=1e-6)
        np.testing.assert_array_equal(alone.class_ids + 1, theirs["labels"][shown].numpy())
        assert (alone.masks != (theirs["masks"][shown, 0] >= 0.5).numpy()).mean() < 1e-4
        x0, y0, x1, y1 = theirs["boxes"][shown].numpy().T
        np.testing.assert_allclose(alone.boxes, np.stack([x0, y0, x1 - x0, y1 - y0], 1), atol=1e-3)
    second = found[1]
    assert isinstance(second, MaskSet)
    assert second.size == size
    assert second.masks.shape[1:] == size


def test_torchvision_reads_what_is_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    make(name="maskrcnn-resnet50-fpn").save(tmp_path, None)
    with torch.device("meta"):
        theirs = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    assert not any(theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True))


def test_torchvisions_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its own builder takes them: frozen BatchNorm without an eps, stem and first stage too; last layers are new."""
    torch.manual_seed(7)
    state = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(state))
    model = make("torchvision", name="maskrcnn-resnet50-fpn")
    same = {key for key, value in model.net.state_dict().items() if torch.equal(value, state[key])}
    others = model.net.state_dict().keys() - same
    assert {key.split(".")[1] for key in others} == {"box_predictor", "mask_predictor"}
    norms = [m for m in model.net.modules() if isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d)]
    assert {(type(norm), norm.eps) for norm in norms} == {(FrozenBatchNorm2d, 0.0)}
    frozen = {name.split(".")[3] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def test_torchvisions_weights_that_can_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    for weights in ("torchvision", "imagenet"):
        with pytest.raises(
            InputError, match=rf"model\.weights: {weights}: https://.* can't be downloaded: .*no network"
        ):
            make(weights, name="maskrcnn-resnet50-fpn-v2")
    with pytest.raises(InputError, match="allowed for maskrcnn-resnet101-fpn: imagenet, a folder"):
        make("torchvision", name="maskrcnn-resnet101-fpn")


# --- the bundle ----------------------------------------------------------------------------------------------------


def test_a_bundle_gives_the_same_outputs(tmp_path: Path) -> None:
    model = make().eval()
    model.save(tmp_path, (64, 96))
    again = load_model("maskrcnn-tiny", tmp_path, CLASSES, "instance").eval()
    images = draw((64, 96), (100, 70))
    before, after = model(images).values, again(images).values
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(before["scores"]) > 0
    assert json.loads((tmp_path / "maskrcnn.json").read_text())["size"] == [64, 96]


def test_weights_from_a_folder_and_s3(tmp_path: Path, s3_bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    first = make()
    first.save(tmp_path, None)
    for path in tmp_path.iterdir():
        storage.write_bytes(f"{s3_bucket}/weights/{path.name}", path.read_bytes())
    for weights in (str(tmp_path), f"{s3_bucket}/weights"):
        again = make(weights).state_dict()
        assert all(torch.equal(again[name], value) for name, value in first.state_dict().items() if name in again)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in make(str(tmp_path)).modules())
    with caplog.at_level(logging.INFO, logger="raysseg"):
        other = make(str(tmp_path), make_classes(200))
    assert "new in this model: roi_heads.box_predictor., roi_heads.mask_predictor." in caplog.text
    assert "not exact" in caplog.text
    assert other.net.roi_heads.mask_predictor.mask_fcn_logits.weight.shape[0] == 201
    assert torch.equal(other.net.rpn.head.cls_logits.weight, first.net.rpn.head.cls_logits.weight)
    frozen = other.eval()
    frozen.save(tmp_path, None)
    loaded = load_model("maskrcnn-tiny", tmp_path, make_classes(200), "instance").eval()
    a, b = frozen(draw((64, 96))).values, loaded(draw((64, 96))).values
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    make().save(tmp_path, None)
    with pytest.raises(InputError, match="is of maskrcnn-tiny, which is no maskrcnn-resnet50-fpn"):
        make(str(tmp_path), name="maskrcnn-resnet50-fpn")
    with pytest.raises(InputError, match=r"model\.weights: .*/nothing can't be loaded"):
        make(str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="can't be loaded"):
        make(str(tmp_path))


def test_class_weights_and_encoders_are_refused(tmp_path: Path) -> None:
    model = "model={name: maskrcnn-tiny, weights: null}"
    with pytest.raises(JobError, match=r"loss\.class_weights: maskrcnn-tiny brings its own loss; allowed: nothing"):
        example_job(str(tmp_path), "x", model, "task=instance", "loss={class_weights: inverse}")
    with pytest.raises(JobError, match=r"model\.encoder: maskrcnn-tiny has its own"):
        example_job(
            str(tmp_path), "x", "model={name: maskrcnn-tiny, weights: null, encoder: resnet18}", "task=instance"
        )


# --- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_regions", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("is_v2", "is_pretrained"), [(False, False), (False, True), (True, False)])
def test_every_parameter_has_a_gradient(num_regions: int, dtype: torch.dtype, is_v2: bool, is_pretrained: bool) -> None:
    shape = replace(SHAPES["maskrcnn-tiny"], is_v2=is_v2)
    model = MaskRcnn("maskrcnn-tiny", build_net(shape, len(CLASSES), is_pretrained=is_pretrained), CLASSES)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        losses = losses_of(model, draw((64, 96), (64, 96)), make_targets(2, num_regions))
    assert set(losses) == {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"}
    for name, gradient in gradients_of(model, losses).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
    assert all(buffer.isfinite().all() for buffer in model.buffers())  # BatchNorm has seen no regions at all


def test_boxes_keep_their_precision_in_bf16() -> None:
    """bf16 knows multiples of 4 pixels alone from 512 on."""
    model = make().eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        values = model(draw((64, 640))).values
    assert (values["boxes"].dtype, values["scores"].dtype) == (torch.float32, torch.float32)
    right = values["boxes"][:, 2]
    right = right[(right > 512) & (right < 640)]
    assert (right % 4 != 0).any()


@pytest.mark.parametrize("case", ["stand-in", "all ignored", "all but a sliver ignored"])
def test_what_does_not_count_gives_no_gradient(case: str) -> None:
    model = make()
    targets = make_targets(1, 0)
    targets.labels[:] = CLASSES.ignore
    if case == "stand-in":
        targets = Targets(targets.labels * 0 + CLASSES.nothing, torch.zeros(1), targets.seeds, targets.regions)
    if case == "all but a sliver ignored":
        targets.labels[0, 30, 40] = CLASSES.nothing
    gradients = gradients_of(model, losses_of(model, draw((64, 96)), targets))
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    if case != "all but a sliver ignored":
        assert not any(gradient.any() for gradient in gradients.values() if gradient is not None)


def test_stand_ins_do_not_change_the_loss() -> None:
    model = make()
    images, both = draw((64, 96), (64, 96)), make_targets(2, 3)
    first = Targets(both.labels[:1], both.weights[:1], both.seeds[:1], (both.regions or ())[:1])
    stand_in = Targets(both.labels, torch.tensor([1.0, 0.0]), both.seeds, both.regions)
    alone, beside = losses_of(model, images[:1], first), losses_of(model, images, stand_in)
    assert alone.keys() == beside.keys()
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_losses_are_weighted_by_images() -> None:
    model = make()
    targets = make_targets(2, 3)
    torch.manual_seed(3)
    whole = model.train()(torch.stack(draw((64, 96), (64, 96))), targets, {"images": torch.tensor(8.0)}).losses
    part = losses_of(model, draw((64, 96), (64, 96)), targets)
    assert all(whole[name].item() == pytest.approx(part[name].item() / 4) for name in part)


def test_ignored_boxes_are_no_background() -> None:
    ignored = torch.zeros((64, 96), dtype=torch.bool)
    ignored[:, 64:] = True
    boxes = torch.tensor([[0, 0, 20, 20], [70, 0, 90, 20], [60, 0, 70, 20], [50, 0, 70, 20], [90, 50, 200, 90]]).float()
    assert _is_ignored(boxes, torch.ones(5, dtype=torch.bool), ignored).tolist() == [False, True, True, False, True]
    assert not _is_ignored(boxes, torch.zeros(5, dtype=torch.bool), ignored).any()
    everything = _is_ignored(boxes[1:3], torch.ones(2, dtype=torch.bool), ignored)
    assert everything.tolist() == [True, False]  # the least ignored stays


def test_the_region_heads_see_no_ignored_pixels() -> None:
    """Anchors over the ignored part have no gradient, of whatever loss."""
    model, targets = make(), make_targets(1, 1)
    seen: list[Tensor] = []
    model.net.rpn.head.register_forward_hook(lambda module, inputs, outputs: seen.extend(outputs[0]))
    losses = losses_of(model, draw((64, 96)), targets)
    gradient = torch.autograd.grad(losses["objectness"], seen[0])[0][0]  # (3, 16, 24): anchors of 8 pixels at stride 4
    assert gradient[:, :, :15].any()
    assert not gradient[:, :, 17:].any()


# --- outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [1, 200])
def test_number_of_classes(num_classes: int) -> None:
    model = make(classes=make_classes(num_classes))
    targets = make_targets(1, 1, ignore=model.classes.ignore)
    assert all(loss.isfinite() for loss in losses_of(model, draw((64, 96)), targets).values())
    views = predict(model.eval(), [np.full((70, 90, 3), 127, np.uint8)], None, torch.float32, Inference())
    assert isinstance(views[0], MaskSet)
    assert views[0].size == (70, 90)
    assert set(views[0].class_ids) <= set(range(num_classes))


def test_nothing_found() -> None:
    model = make().eval()
    model.net.roi_heads.score_thresh = 1.0
    outputs = model(draw((64, 96), (40, 50)), make_targets(2, 1))  # targets are left aside
    assert outputs.losses == {}
    views = model.decode(outputs, [(64, 96), (40, 50)], Inference())
    assert [(len(view), view.masks.shape) for view in views if isinstance(view, MaskSet)] == [
        (0, (0, 64, 96)),
        (0, (0, 40, 50)),
    ]


def test_decode_thresholds_and_scales() -> None:
    values = {
        "boxes": torch.tensor([[10.0, 10, 30, 20], [0, 0, 8, 8], [4, 4, 20, 20], [0, 0, 9, 9]]),
        "labels": torch.tensor([2, 0, 1, 1]),
        "scores": torch.tensor([0.3, 0.9, 0.5, 0.8]),
        "masks": torch.tensor([0.9, 0.9, 0.1, 0.6])[:, None, None, None].expand(4, 1, 28, 28),
        "image": torch.tensor([0, 0, 0, 1]),
        "sizes": torch.tensor([[40, 60], [40, 60]]),
    }
    model = make()

    def decode(**settings: float) -> MaskSet:
        view = model.decode(Outputs(values), [(80, 180), (40, 60)], Inference(**settings))[0]
        assert isinstance(view, MaskSet)
        return view

    view = decode()
    assert (view.class_ids.tolist(), view.areas) == ([0, 2], None)  # the one in the middle has no pixel
    np.testing.assert_allclose(view.scores, [0.9, 0.3], rtol=1e-6)
    assert view.scores.dtype == np.float64
    np.testing.assert_allclose(view.boxes, [[0, 0, 24, 16], [30, 20, 60, 20]])
    rows, columns = np.nonzero(view.masks[1])
    assert abs(np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) - [30, 20, 90, 40]).max() <= 2
    assert decode(score_threshold=0.4).class_ids.tolist() == [0]
    assert decode(mask_threshold=0.05).class_ids.tolist() == [0, 1, 2]
    assert decode(mask_threshold=0.05, max_instances=2).class_ids.tolist() == [0, 1]


def test_an_image_may_hold_as_many_instances_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    monkeypatch.setattr(model.net.rpn, "_post_nms_top_n", {"training": 300, "testing": 300})
    monkeypatch.setattr(model.net.roi_heads, "score_thresh", 0.0)
    monkeypatch.setattr(model.net.roi_heads, "nms_thresh", 1.0)
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    for most in (7, 100, 250):
        (view,) = predict(model, [image], None, torch.float32, Inference(max_instances=most, mask_threshold=0.01))
        assert isinstance(view, MaskSet)
        assert len(view) == most


def test_images_of_several_sizes_go_through_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    batches: list[list[tuple[int, ...]]] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda images: batches.append([tuple(i.shape) for i in images]) or forward(images)
    )
    images = [np.full((height, width, 3), 90, np.uint8) for height, width in ((64, 96), (100, 70), (20, 30))]
    views = predict(model, images, None, torch.float32, Inference())
    assert batches == [[(3, 64, 96), (3, 100, 70), (3, 64, 64)]]
    assert [view.size for view in views if isinstance(view, MaskSet)] == [(64, 96), (100, 70), (20, 30)]
