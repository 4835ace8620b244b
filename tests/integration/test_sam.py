"""Prompted models: against transformers' processors, forward and pipeline; halves, precision, odd images, errors."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.pipelines.mask_generation import MaskGenerationPipeline

from raysseg import rle, storage
from raysseg.catalogue import PROMPT_MODELS
from raysseg.models import sam
from raysseg.models.sam import FAMILIES, Automatic, Embedding, PromptModel
from raysseg.schema import InputError, Prompt
from tests.tiny_sam import KINDS, SIDE, write_tiny_sam

SIZE = (50, 90)
WHOLE = rle.from_mask(np.ones(SIZE, np.bool_))
POINT = Prompt(points=((70.0, 12.0),), labels=(1,))
PROMPTS = {
    "point": POINT,
    "points": Prompt(points=((70, 12), (3.5, 44)), labels=(1, 0)),
    "box": Prompt(box=(10, 5, 88, 31)),
    "box and point": Prompt(points=((20, 30),), labels=(0,), box=(0, 0, 90, 50)),
    "one mask": replace(POINT, is_multimask=False),
}
ALL = Automatic(points_per_side=3, pred_iou=0, stability=0, nms=1, batch=4)


def picture(*size: int) -> npt.NDArray[np.uint8]:
    """Smooth noise."""
    small = Image.fromarray(np.random.default_rng(7).integers(0, 256, (6, 6, 3), np.uint8))
    return np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC))


def blob(*size: int) -> npt.NDArray[np.bool_]:
    y, x = np.mgrid[: size[0], : size[1]] / np.array(size)[:, None, None]
    return (y - 0.4) ** 2 + (x - 0.7) ** 2 < 0.05


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in found.items():
        write_tiny_sam(folder, kind)
    return found


@pytest.fixture(scope="session")
def models(folders: dict[str, Path]) -> dict[str, PromptModel]:
    return {kind: PromptModel(str(folder)) for kind, folder in folders.items()}


def processor(kind: str) -> transformers.ProcessorMixin:
    """transformers' own, for tiny models."""
    if FAMILIES[kind].is_square:
        square = {"height": SIDE, "width": SIDE}
        if kind.startswith("sam3"):
            images = transformers.Sam3ImageProcessor(size=square)
            return transformers.Sam3TrackerProcessor(images, target_size=SIDE)
        return transformers.Sam2Processor(transformers.Sam2ImageProcessor(size=square), target_size=SIDE)
    images = transformers.SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    return (transformers.SamHQProcessor if kind == "sam_hq" else transformers.SamProcessor)(images)


def reference(
    folder: Path, kind: str, image: npt.NDArray[np.uint8], prompt: Prompt, mask_logits: Tensor | None = None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32], Embedding]:
    """Masks (M, H, W) and scores as transformers has them, the best first, and its embedding in full precision."""
    net = getattr(transformers, FAMILIES[kind].net).from_pretrained(folder).eval()
    process = processor(kind)
    given = {}
    if prompt.points:
        given["input_points"] = [[[list(point) for point in prompt.points]]]
        given["input_labels"] = [[list(prompt.labels)]]
    if prompt.box is not None:
        given["input_boxes"] = [[list(prompt.box)]]
    inputs = process(images=image, return_tensors="pt", **given)
    sizes = {name: inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes") if name in inputs}
    inputs = {name: v.float() if v.is_floating_point() else v for name, v in inputs.items()}
    with torch.inference_mode():
        features = net.get_image_embeddings(inputs["pixel_values"])
        out = net(**inputs, input_masks=mask_logits, multimask_output=prompt.is_multimask)
    masks = process.post_process_masks(out.pred_masks, **sizes)[0][0].numpy()
    scores = out.iou_scores[0, 0].numpy()
    order = np.argsort(-scores, kind="stable")
    if isinstance(features, tuple):
        features = [features[0], features[1][0].permute(0, 3, 1, 2)]
    features = [features] if isinstance(features, Tensor) else features
    features = features[::-1] if FAMILIES[kind].is_square else features
    arrays = {name: v[0].numpy() for name, v in zip(FAMILIES[kind].features, features, strict=True)}
    return masks[order], scores[order], Embedding(arrays, image.shape[:2])


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_transformers(
    folders: dict[str, Path], models: dict[str, PromptModel], kind: str, prompt: Prompt
) -> None:
    model, image = models[kind], picture(*SIZE)
    masks, scores, theirs = reference(folders[kind], kind, image, prompt)
    ours = model.embed(image)
    for name, values in theirs.features.items():
        assert ours.features[name].dtype == np.float16
        np.testing.assert_allclose(ours.features[name], values, rtol=2e-3, atol=4e-3)
    assert ours.size == SIZE
    assert ours.nbytes == sum(values.nbytes for values in theirs.features.values()) // 2
    same = model.prompt(theirs, prompt)  # of the same embedding
    assert same.masks.shape == masks.shape == (3 if prompt.is_multimask else 1, *SIZE)
    assert (same.masks != masks).sum() <= 2
    np.testing.assert_allclose(same.scores, scores.clip(0, 1), atol=1e-5)
    found = model.prompt(ours, prompt)  # of ours, in half precision
    np.testing.assert_allclose(found.scores, scores.clip(0, 1), atol=2e-2)
    if np.diff(-scores, append=1).min() > 2e-2:  # in the same order
        assert (found.masks != masks).mean() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_a_prompt(folders: dict[str, Path], models: dict[str, PromptModel], kind: str) -> None:
    model, image, guess = models[kind], picture(*SIZE), blob(*SIZE)
    prompt = Prompt(mask=rle.from_mask(guess))
    logits = model._to_mask_input(prompt.mask, SIZE)
    for one in (prompt, replace(POINT, mask=prompt.mask), replace(PROMPTS["box and point"], mask=prompt.mask)):
        masks, scores, theirs = reference(folders[kind], kind, image, one, logits[None])
        found = model.prompt(theirs, one)
        assert (found.masks != masks).sum() <= 2
        np.testing.assert_allclose(found.scores, scores.clip(0, 1), atol=1e-5)
    other = model.prompt(theirs, Prompt(mask=rle.from_mask(~guess)))
    assert other.rles != model.prompt(theirs, prompt).rles
    shown = torch.nn.functional.interpolate(logits[None], (SIDE, SIDE), mode="bilinear")[0, 0].numpy() > 0
    height, width = model._input_size(SIZE, SIDE)
    assert not shown[height:].any()
    back = np.asarray(Image.fromarray(shown[:height, :width]).resize(SIZE[::-1]))
    assert (back == guess).mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_together_is_as_one_by_one(models: dict[str, PromptModel], kind: str) -> None:
    model = models[kind]
    embedding = model.embed(picture(*SIZE))
    guess = rle.from_mask(blob(*SIZE))
    prompts = [*PROMPTS.values(), Prompt(mask=guess), Prompt(mask=WHOLE), replace(POINT, mask=guess)]
    prompts += [Prompt(points=((x, 3 + x / 3),), labels=(1,)) for x in range(20)]
    found = model.prompt_many(embedding, prompts)
    assert len(found) == len(prompts)
    for prompt, masks in zip(prompts, found, strict=True):
        alone = model.prompt(embedding, prompt)
        assert (alone.masks != masks.masks).sum() <= 2
        np.testing.assert_allclose(alone.scores, masks.scores, atol=1e-4)
    assert model.prompt_many(embedding, []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_the_whole(folders: dict[str, Path], models: dict[str, PromptModel], kind: str) -> None:
    whole, image = models[kind], picture(*SIZE)
    encoder = PromptModel(str(folders[kind]), parts=("encoder",))
    decoder = PromptModel(str(folders[kind]), parts=("decoder",))
    held = [{name for name, _ in model._net.named_parameters()} for model in (encoder, decoder, whole)]
    assert held[0] | held[1] == held[2]
    assert not any(name.startswith("mask_decoder.transformer.") for name in held[0])
    assert not any(name.startswith("vision_encoder.") for name in held[1])
    embedding, expected = encoder.embed(image), whole.embed(image)
    assert embedding.features.keys() == expected.features.keys()
    for name, values in expected.features.items():
        np.testing.assert_array_equal(embedding.features[name], values)
    sent = pickle.loads(pickle.dumps(embedding))
    for array in sent.features.values():
        array.flags.writeable = False  # as it is in shared memory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decoder.prompt(sent, POINT)
    assert found.rles == whole.prompt(expected, POINT).rles
    np.testing.assert_array_equal(found.scores, whole.prompt(expected, POINT).scores)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_all_that_a_grid_finds(models: dict[str, PromptModel], kind: str) -> None:
    model = models[kind]
    embedding = model.embed(picture(*SIZE))
    grid = [Prompt(points=((x * 90, y * 50),), labels=(1,)) for y in (1 / 6, 0.5, 5 / 6) for x in (1 / 6, 0.5, 5 / 6)]
    expected = [encoded for masks in model.prompt_many(embedding, grid) for encoded in masks.rles]
    empty = rle.from_mask(np.zeros(SIZE, np.bool_))
    found = model.everything(embedding, ALL)
    assert found.scores is not None
    assert len(found) == sum(encoded != empty for encoded in expected)
    assert len(set(found.rles) & set(expected)) >= 0.9 * len(set(found.rles))  # but for rounding
    assert (np.diff(found.scores) <= 0).all()
    assert not found.class_ids.any()
    assert not found.is_crowd.any()
    assert rle.from_masks(found.masks) == list(found.rles)
    again = model.everything(embedding, ALL)
    assert again.rles == found.rles
    middle = float(np.median(found.scores))
    likely = model.everything(embedding, replace(ALL, pred_iou=middle))
    assert len(likely) == (found.scores > middle).sum()
    assert len(model.everything(embedding, replace(ALL, nms=0.5))) < len(found)
    steady = [len(model.everything(embedding, replace(ALL, stability=least))) for least in (0, 0.7, 0.9, 1)]
    assert steady == sorted(steady, reverse=True)
    assert steady[0] > steady[-1]


@pytest.mark.parametrize(("kind", "size"), [("sam", SIZE), ("sam_hq", SIZE), ("sam2", (60, 60))])
def test_everything_is_that_of_transformers(
    folders: dict[str, Path], models: dict[str, PromptModel], kind: str, size: tuple[int, int]
) -> None:
    """Of SAM 2 on squares: elsewhere transformers 5.23 scales its grid by the longer side, as SAM's."""
    image = picture(*size)
    net = getattr(transformers, FAMILIES[kind].net).from_pretrained(folders[kind])
    pipeline = MaskGenerationPipeline(model=net, image_processor=processor(kind).image_processor)
    _, _, embedding = reference(folders[kind], kind, image, POINT)
    for overlap, least in ((1.0, 10), (0.9, 1)):
        theirs = pipeline(
            Image.fromarray(image),
            points_per_crop=6,
            points_per_batch=16,
            pred_iou_thresh=0.3,
            stability_score_thresh=0.7,
            crops_nms_thresh=overlap,
        )
        automatic = Automatic(points_per_side=6, pred_iou=0.3, stability=0.7, nms=overlap, batch=16)
        ours = models[kind].everything(embedding, automatic)
        assert len(ours) == len(theirs["masks"]) >= least
        np.testing.assert_allclose(ours.scores, theirs["scores"].numpy().clip(0, 1), atol=1e-4)
        assert (ours.masks != np.stack(theirs["masks"])).mean() < 1e-4


def test_specks_go() -> None:
    mask = np.zeros((20, 30), np.bool_)
    mask[2:12, 2:12] = True
    mask[5:7, 5:7] = False  # a hole of 4
    mask[15, 20:23] = True  # an island of 3
    found = sam._without_specks(mask, 4)
    assert not found[15].any()
    assert not found[5, 5]
    assert sam._without_specks(mask, 5)[2:12, 2:12].all()
    assert sam._without_specks(mask, 400).sum() == 100  # the largest stays
    assert not sam._without_specks(np.zeros((4, 4), np.bool_), 3).any()
    assert sam._without_specks(np.ones((4, 4), np.bool_), 30).all()


def test_small_regions_go(models: dict[str, PromptModel]) -> None:
    embedding = models["sam"].embed(picture(*SIZE))
    found = models["sam"].everything(embedding, replace(ALL, min_region=200))
    assert len(found)
    for mask in found.masks:
        np.testing.assert_array_equal(sam._without_specks(mask, 200), mask)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (70, 3), (SIDE, SIDE), (150, 100)])
@pytest.mark.parametrize("kind", ["sam", "sam_hq", "sam2", "sam3_tracker"])
def test_images_of_any_size(models: dict[str, PromptModel], kind: str, size: tuple[int, int]) -> None:
    model = models[kind]
    embedding = model.embed(picture(*size))
    height, width = size
    prompts = [
        Prompt(points=((width - 1, height - 1),), labels=(1,)),
        Prompt(box=(0, 0, width, height), mask=rle.from_mask(np.ones(size, np.bool_))),
    ]
    for masks in model.prompt_many(embedding, prompts):
        assert masks.masks.shape == (3, *size)
        assert rle.from_masks(masks.masks) == list(masks.rles)
    assert model.everything(embedding, ALL).size == size


@pytest.mark.parametrize("kind", KINDS)
def test_few_masks_at_full_size_at_a_time(
    models: dict[str, PromptModel], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[kind]
    embedding = model.embed(picture(*SIZE))
    expected, everything = model.prompt(embedding, POINT), model.everything(embedding, ALL)
    monkeypatch.setattr(sam, "_FULL_PIXELS", 1)
    assert {len(part) for part in model._iter_full(torch.zeros(5, 16, 16), SIZE)} == {1}
    assert model.prompt(embedding, POINT).rles == expected.rles
    assert model.everything(embedding, ALL).rles == everything.rles


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(folders: dict[str, Path], models: dict[str, PromptModel], kind: str) -> None:
    image = picture(*SIZE)
    model = PromptModel(str(folders[kind]), precision="bf16")
    embedding = model.embed(image)
    for name, values in models[kind].embed(image).features.items():
        assert np.abs(embedding.features[name] - values).mean() < 0.1 * np.abs(values).mean()
    np.testing.assert_allclose(
        model.prompt(embedding, POINT).scores, models[kind].prompt(embedding, POINT).scores, atol=0.1
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no points, no box and no mask; give at least one"),
        ({"points": ((1, 2),)}, r"prompt\.labels: 0 for 1 points; give one a point"),
        ({"points": ((1, 2),), "labels": (2,)}, r"prompt\.labels: 2; allowed: 1 on the object, 0"),
        ({"points": ((1, float("nan")),), "labels": (1,)}, r"prompt\.points: \[1, nan\]; give x, y"),
        ({"points": ((1, 2, 3),), "labels": (1,)}, r"prompt\.points: \[1, 2, 3\]; give x, y"),
        ({"box": (1, 2, 3)}, r"prompt\.box: \[1, 2, 3\]; give x0, y0, x1, y1"),
        ({"box": (5, 2, 5, 9)}, r"prompt\.box: .* has no area; .*x0 < x1"),
        (
            {"points": ((90, 2),), "labels": (1,)},
            r"\[90, 2\] lies outside .*x from 0 to below 90, y from 0 to",
        ),
        ({"points": ((1, -1),), "labels": (1,)}, r"prompt\.points: \[1, -1\] lies outside"),
        ({"box": (5, 2, 91, 9)}, r"prompt\.box: .* goes beyond the image; allowed: x from 0 to 90, y from 0 to 50"),
        ({"mask": rle.from_mask(np.ones((4, 4), np.bool_))}, r"prompt\.mask: has an RLE of 16 pixels, .* 90x50"),
    ],
)
def test_bad_prompts_say_what_is_allowed(models: dict[str, PromptModel], given: dict[str, tuple], message: str) -> None:
    embedding = models["sam"].embed(picture(*SIZE))
    with pytest.raises(InputError, match=message):
        models["sam"].prompt(embedding, Prompt(**given))


@pytest.mark.parametrize(
    "values", [{"points_per_side": 0}, {"batch": 0}, {"nms": 1.5}, {"pred_iou": -1}, {"min_region": -1}]
)
def test_bad_settings_say_what_is_allowed(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=rf"automatic\.{next(iter(values))}: .*; allowed: "):
        Automatic(**values)


def test_other_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = SegformerConfig(depths=[1] * 4, hidden_sizes=[8] * 4, decoder_hidden_size=8, num_attention_heads=[1] * 4)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segformer")
    with pytest.raises(InputError, match=r"^weights: .*/segformer is a segformer model; .*such as facebook/sam-vit"):
        PromptModel(str(tmp_path / "segformer"))
    with pytest.raises(InputError, match=r"^weights: .*/nothing can't be loaded: .* s3:// URI$"):
        PromptModel(str(tmp_path / "nothing"))
    tensors = load_file(folders["sam"] / "model.safetensors")
    del tensors["mask_decoder.iou_token.weight"]
    (tmp_path / "config.json").write_bytes((folders["sam"] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"nothing that fits mask_decoder\.iou_token\.weight of .* SamModel"):
        PromptModel(str(tmp_path))


def test_weights_from_s3(folders: dict[str, Path], models: dict[str, PromptModel], s3_bucket: str) -> None:
    for path in folders["sam2"].iterdir():
        storage.write_bytes(f"{s3_bucket}/weights/{path.name}", path.read_bytes())
    embedding = PromptModel(f"{s3_bucket}/weights").embed(picture(*SIZE))
    np.testing.assert_array_equal(embedding.features["image"], models["sam2"].embed(picture(*SIZE)).features["image"])


def test_names_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    for name, weights in PROMPT_MODELS.items():
        assert f"`{name}`" in page
        assert f"`{weights}`" in page


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    write_tiny_sam(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        PromptModel(str(tmp_path))
