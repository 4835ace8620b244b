from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from raysseg import config
from raysseg.config import (
    EvaluateJob,
    ExportJob,
    Inference,
    JobError,
    MasksSource,
    PredictJob,
    ShardJob,
    ShardsSource,
    TrainJob,
)
from raysseg.data.classes import Category, Vocabulary, build_class_map
from raysseg.storage import StorageError

ROOT = Path(__file__).parents[2]
JOB_FILES = sorted((ROOT / "jobs").glob("*.yaml"))
BLOCKS = [
    (path.name, number, *found)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, found in enumerate(re.findall(r"```(yaml|json)\n(.*?)```", path.read_text(), re.DOTALL))
]

TRAIN: dict[str, Any] = {
    "kind": "train",
    "name": "check",
    "task": "semantic",
    "classes": ["road", "sky"],
    "data": {
        "train": {"format": "masks", "images": "/d/images", "masks": "/d/masks"},
        "val": {"format": "shards", "uri": "s3://bucket/val"},
    },
    "model": {"name": "segformer-b0", "weights": None},
    "storage": "s3://bucket/runs",
}
EVALUATE: dict[str, Any] = {
    "kind": "evaluate",
    "name": "check",
    "task": "semantic",
    "classes": ["road", "sky"],
    "data": {"format": "masks", "masks": "/d/masks"},
    "predictions": {"format": "masks", "masks": "/d/pred"},
}
SHARD: dict[str, Any] = {
    "kind": "shard",
    "name": "check",
    "task": "semantic",
    "classes": ["road", "sky"],
    "data": {"format": "masks", "images": "/d/images", "masks": "/d/masks"},
    "output": {"uri": "/d/shards"},
}
PREDICT: dict[str, Any] = {
    "kind": "predict",
    "name": "check",
    "bundle": "/b",
    "data": {"format": "masks", "images": "/d/images"},
    "output": {"format": "coco", "uri": "/d/out"},
}
NOTHING = object()


def changed(base: dict[str, Any], **changes: object) -> dict[str, Any]:
    """A job with some keys set; two underscores stand for a dot, and NOTHING removes a key."""
    job = copy.deepcopy(base)
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        section = job
        for name in sections:
            section = section.setdefault(name, {})
        if value is NOTHING:
            del section[key]
        else:
            section[key] = value
    return job


def mistakes(raw: dict[str, Any]) -> list[str]:
    """The lines of a job's error, less the name of the file."""
    with pytest.raises(JobError) as caught:
        config.parse(raw, "job.yaml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("job.yaml: ") for line in lines)
    return [line.removeprefix("job.yaml: ") for line in lines]


def written(folder: Path, raw: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return path


def train_job(raw: dict[str, Any]) -> TrainJob:
    job = config.parse(raw)
    assert isinstance(job, TrainJob)
    return job


# ---- job files


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_every_job_file_is_parsed_and_fits_the_schema(path: Path) -> None:
    job = config.load(path)
    assert job.kind in path.read_text()
    jsonschema.validate(yaml.safe_load(path.read_text()), config.json_schema())


def test_there_are_job_files() -> None:
    assert {"camvid-segformer-semantic", "example-segformer-semantic"} <= {path.stem for path in JOB_FILES}


def test_schema_is_a_schema_and_refuses_what_the_job_refuses() -> None:
    schema = config.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for job in (TRAIN, EVALUATE, SHARD, PREDICT):
        jsonschema.validate(job, schema)
    for wrong in (
        changed(TRAIN, modle={}),
        changed(TRAIN, optimizer__lr=-1),
        changed(TRAIN, kind="trian"),
        changed(EVALUATE, data__format="voc"),
        changed(SHARD, output=NOTHING),
        changed(PREDICT, output__format="yolo"),
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_resolved_job_is_a_job_again() -> None:
    for raw in (TRAIN, EVALUATE, SHARD, PREDICT):
        job = config.parse(raw)
        assert config.parse(json.loads(job.model_dump_json())) == job


def test_each_kind_has_its_class() -> None:
    kinds = [TrainJob, EvaluateJob, ShardJob, PredictJob]
    assert [type(config.parse(raw)) for raw in (TRAIN, EVALUATE, SHARD, PREDICT)] == kinds


@pytest.mark.parametrize(("page", "number", "language", "text"), BLOCKS)
def test_block_of_the_docs_is_a_job_a_source_a_class_list_or_a_policy(
    page: str, number: int, language: str, text: str, tmp_path: Path
) -> None:
    content = yaml.safe_load(text)
    if "Statement" in content:
        assert content["Version"] == "2012-10-17"  # what it allows: tests/integration/test_policy.py
    elif language == "json":
        (tmp_path / "classes.json").write_text(text)
        names = ("car", "bus", "truck", "person")
        vocabulary = Vocabulary(tuple(Category(i, name) for i, name in enumerate(names, 1)))
        assert len(build_class_map(str(tmp_path / "classes.json"), vocabulary)) == len(content["classes"])
    elif "kind" in content:
        config.parse(content)
    else:
        TypeAdapter(config.AnySource).validate_python(content)


def test_source_is_told_by_its_format() -> None:
    job = train_job(TRAIN)
    assert isinstance(job.data.train, MasksSource)
    assert isinstance(job.data.val, ShardsSource)


def test_tiles_and_views_are_for_semantic_models_alone() -> None:
    for inference in (Inference(tile=(512, 512)), Inference(scales=(0.5, 1.0)), Inference(flip=True)):
        assert inference.misfit("semantic", None) is None
        for task in ("instance", "panoptic"):
            misfit = inference.misfit(task, None)
            assert misfit is not None
            assert f"where the task is {task} yet, since images go through whole and once" in misfit[1]
    assert Inference(score_threshold=0.3, max_instances=10).misfit("instance", (64, 64)) is None
    assert (Inference(overlap_threshold=0.3).misfit("instance", None) or "")[0] == "overlap_threshold"


def test_inference_keys_win_over_a_bundles_one_by_one() -> None:
    bundle = Inference(tile=(512, 512), flip=True)
    assert Inference(overlap=0.5).over(bundle) == Inference(tile=(512, 512), flip=True, overlap=0.5)
    assert Inference(flip=False, tile=None).over(bundle) == Inference()


def test_stored_predictions_take_no_inference() -> None:
    line = "inference: has no effect on stored predictions; leave it out"
    assert mistakes(changed(EVALUATE, inference={"flip": True})) == [line]


def test_export_by_plain_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = config.plain_export("s3://bucket/runs/x/bundle", "out/x.onnx", ["size=[512, 512]"])
    assert isinstance(job, ExportJob)
    assert (job.name, job.size) == ("export-s3-bucket-runs-x-bundle", (512, 512))
    assert job.file_uri == str(tmp_path / "out/x.onnx")
    folder = config.plain_export("bundle", "s3://bucket/models")
    assert isinstance(folder, ExportJob)
    assert folder.file_uri == "s3://bucket/models/model.onnx"


def test_neither_torch_nor_ray_is_loaded() -> None:
    code = "import sys, raysseg.cli, raysseg.config; print({'torch', 'ray', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- defaults < file < overrides


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, changed(TRAIN, optimizer__lr=0.25, schedule__epochs=7))
    plain = config.load(path)
    assert isinstance(plain, TrainJob)
    assert (plain.optimizer.lr, plain.schedule.epochs, plain.batch.global_size) == (0.25, 7, 16)
    overridden = config.load(path, ["optimizer.lr=1e-4", "batch.global_size=8", "optimizer.lr=1e-3"])
    assert isinstance(overridden, TrainJob)
    assert overridden.optimizer.lr == 1e-3, "the last one wins, and YAML's string 1e-3 is a number"
    assert (overridden.schedule.epochs, overridden.batch.global_size) == (7, 8)
    assert overridden.batch.per_worker == plain.batch.per_worker


def test_override_values_are_yaml(tmp_path: Path) -> None:
    path = written(tmp_path, TRAIN)
    overrides = [
        "scaling.workers=[1, 4]",
        "data.augment=null",
        "model.weights=nvidia/mit-b0",
        "compile=true",
        "data.train={format: shards, uri: 's3://b/a=b', images: null}",
    ]
    with pytest.raises(JobError, match=r"data\.train\.images"):
        config.load(path, overrides)
    job = config.load(path, overrides[:-1])
    assert isinstance(job, TrainJob)
    assert job.scaling.workers == (1, 4)
    assert job.data.augment is None
    assert job.model.weights == "nvidia/mit-b0"
    assert job.compile is True


def test_override_may_hold_an_equals_sign(tmp_path: Path) -> None:
    job = config.load(written(tmp_path, TRAIN), ["data.val.uri=s3://bucket/a=b"])
    assert isinstance(job, TrainJob)
    assert isinstance(job.data.val, ShardsSource)
    assert job.data.val.uri == "s3://bucket/a=b"


@pytest.mark.parametrize(
    ("every", "steps", "seconds"),
    [("500 steps", 500, None), ("1 step", 1, None), ("2 epochs", 14, None), ("10 minutes", None, 600.0)],
)
def test_an_interval_goes_by_steps_or_by_time(
    tmp_path: Path, every: str, steps: int | None, seconds: float | None
) -> None:
    job = config.load(written(tmp_path, TRAIN), [f"checkpoint.every={every}"])
    assert isinstance(job, config.TrainJob)
    assert (job.checkpoint.every_steps(steps_per_epoch=7), job.checkpoint.every_s) == (steps, seconds)


def test_a_loss_is_better_the_smaller_it_is(tmp_path: Path) -> None:
    job = config.load(written(tmp_path, TRAIN), ["checkpoint.metric=train/loss"])
    assert isinstance(job, config.TrainJob)
    assert job.checkpoint.mode == "min"
    asked = config.load(written(tmp_path, TRAIN), ["checkpoint={metric: train/loss, mode: max}"])
    assert isinstance(asked, config.TrainJob)
    assert asked.checkpoint.mode == "max"


@pytest.mark.parametrize("every", ["10 min", "0 steps", "steps", "1.5 hours", "500"])
def test_what_is_no_interval_is_told_what_is(tmp_path: Path, every: str) -> None:
    with pytest.raises(JobError, match=r"checkpoint\.every: received .*such as `500 steps`, `10 minutes` or `1 epoch`"):
        config.load(written(tmp_path, TRAIN), [f"checkpoint.every='{every}'"])


@pytest.mark.parametrize("override", ["optimizer", "=3", "optimizer.lr=["])
def test_broken_override_is_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(JobError, match="override") as caught:
        config.load(written(tmp_path, TRAIN), [override])
    assert repr(override) in str(caught.value)


def test_unknown_override_names_the_dotted_path(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"optimizer\.learning_rate: .*did you mean `lr`\?"):
        config.load(written(tmp_path, TRAIN), ["optimizer.learning_rate=1"])


@pytest.mark.parametrize(
    ("weights", "optimizer", "expected"),
    [
        (None, {}, (6e-4, 1.0)),
        ("nvidia/mit-b0", {}, (6e-5, 10.0)),
        ("nvidia/mit-b0", {"lr": 0.5}, (0.5, 10.0)),
        (None, {"head_lr_factor": 3.0}, (6e-4, 3.0)),
    ],
)
def test_learning_rate_suits_the_model(
    weights: str | None, optimizer: dict[str, float], expected: tuple[float, float]
) -> None:
    job = train_job(changed(TRAIN, model__weights=weights, optimizer=optimizer))
    assert (job.optimizer.lr, job.optimizer.head_lr_factor) == expected


@pytest.mark.parametrize(
    ("task", "inference", "expected"),
    [("panoptic", {}, 0.85), ("instance", {}, 0.0), ("panoptic", {"score_threshold": 0.3}, 0.3)],
)
def test_score_threshold_suits_the_model_and_the_task(task: str, inference: dict[str, float], expected: float) -> None:
    changes = {"task": task, "model__name": "detr-tiny", "model__weights": None, "inference": inference}
    job = train_job({key: value for key, value in changed(TRAIN, **changes).items() if key != "loss"})
    assert job.inference.score_threshold == expected


def test_on_error_is_handed_down_to_sources_that_say_nothing() -> None:
    job = train_job(changed(TRAIN, data__on_error="skip", data__val__on_error="stop"))
    assert (job.data.train.is_skipping, job.data.val.is_skipping) == (True, False)
    job = train_job(TRAIN)
    assert (job.data.train.is_skipping, job.data.val.is_skipping) == (False, False)


def test_lists_where_scalars_may_stand_too() -> None:
    job = train_job(changed(TRAIN, scaling__workers=[1, 4], loss__class_weights=[1, 2.5]))
    assert job.scaling.workers == (1, 4)
    assert job.loss.class_weights == (1.0, 2.5)
    assert not job.scaling.in_process
    assert train_job(changed(TRAIN, scaling__workers=0)).scaling.in_process


def test_loss_terms_in_use() -> None:
    assert train_job(TRAIN).loss.terms == {"cross_entropy": 1.0}
    assert train_job(changed(TRAIN, loss={"cross_entropy": 0, "dice": 0.5})).loss.terms == {"dice": 0.5}


def test_jobs_are_frozen() -> None:
    job = train_job(TRAIN)
    for section, key in ((job, "seed"), (job.optimizer, "lr"), (job.data.train, "on_error")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 3)


def test_local_paths_become_absolute_and_remote_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = train_job(changed(TRAIN, storage="runs", classes="classes.json"))
    assert (job.storage, job.classes) == (str(tmp_path / "runs"), str(tmp_path / "classes.json"))
    assert job.run_uri == str(tmp_path / "runs" / "check")
    assert train_job(TRAIN).run_uri == "s3://bucket/runs/check"


# ---- mistakes


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"scaling__workers": -1}, "scaling.workers: received -1; allowed: numbers from 0 on, or a list"),
        ({"scaling__workers": "many"}, 'scaling.workers: received "many"; allowed: a whole number, or a list'),
        ({"scaling__workers": [0, 4]}, "scaling.workers.0: received 0; allowed: numbers from 1 on"),
        ({"scaling__workers": [4, 1]}, "scaling.workers: received [4, 1]; allowed: [smallest, largest]"),
        (
            {"loss__class_weights": "median"},
            'loss.class_weights: received "median"; '
            "allowed: 'inverse', 'median_frequency' or 'effective_number', or a list",
        ),
        ({"loss__class_weights": [1, -1]}, "loss.class_weights.1: received -1; allowed: numbers from 0 on"),
        (
            {"loss": {"cross_entropy": 0}},
            "loss: every term is 0; "
            "give cross_entropy, focal, ohem, boundary, dice, tversky or lovasz a positive weight",
        ),
        (
            {"loss": {"cross_entropy": 0, "boundary": 1}},
            "loss: boundary alone leaves what is far from boundaries untaught; give cross_entropy, focal, ohem, dice, "
            "tversky or lovasz a positive weight too",
        ),
        (
            {"loss": {"cross_entropy": 0, "dice": 1, "lovasz": 1, "class_weights": "inverse"}},
            "loss.class_weights: no term in use takes them (dice, lovasz); leave them out, or give cross_entropy, "
            "focal, ohem or boundary a positive weight",
        ),
        ({"loss": {"lovasz": -1}}, "loss.lovasz: received -1; allowed: numbers from 0 on"),
        ({"loss__ohem_threshold": 0}, "loss.ohem_threshold: received 0; allowed: numbers above 0"),
        ({"loss__ohem_min_kept": 1.5}, "loss.ohem_min_kept: received 1.5; allowed: numbers up to 1"),
        ({"loss__boundary_sigma": 50}, "loss.boundary_sigma: received 50; allowed: numbers up to 40"),
        ({"loss__tversky_beta": 0}, "loss.tversky_beta: received 0; allowed: numbers above 0"),
        ({"optimizer__lr": "fast"}, 'optimizer.lr: received "fast"; allowed: a number'),
        ({"optimizer__lr": 0}, "optimizer.lr: received 0; allowed: numbers above 0"),
        ({"optimizer__lr": float("inf")}, "optimizer.lr: received Infinity; allowed: a finite number"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr: received NaN; allowed: a finite number"),
        ({"optimizer__name": "adam"}, "optimizer.name: received \"adam\"; allowed: 'adamw' or 'sgd'"),
        ({"optimizer__betas": [0.9, 1]}, "optimizer.betas.1: received 1; allowed: numbers below 1"),
        ({"optimizer": None}, "optimizer: received null; allowed: a mapping of keys to values"),
        ({"schedule__epochs": 1.5}, "schedule.epochs: received 1.5; allowed: a whole number"),
        ({"schedule__warmup": 5}, "schedule.warmup: received 5; allowed: numbers up to 1"),
        ({"seed": -1}, "seed: received -1; allowed: numbers from 0 on"),
        ({"compile": "maybe"}, 'compile: received "maybe"; allowed: true or false'),
        ({"precision": "fp8"}, "precision: received \"fp8\"; allowed: 'auto', 'fp32', 'bf16' or 'fp16'"),
        ({"task": "semantics"}, "task: received \"semantics\"; allowed: 'semantic', 'instance' or 'panoptic'"),
        ({"task": "instance"}, "task: received instance; allowed for `model.name` segformer-b0: semantic"),
        (
            {"inference__score_threshold": 0.5},
            "inference.score_threshold: has no effect where the task is semantic; leave it out",
        ),
        (
            {"inference__overlap": 0.5},
            "inference.overlap: has no effect without `inference.tile`; set that, or leave it out",
        ),
        (
            {"inference__tile": [64, 64], "data__size": [180, 240]},
            "inference.tile: tiles are cut from images as they are, but this model sees them at [180, 240] "
            "(`data.size`); leave it out, or train with data.size=null",
        ),
        ({"inference__tile": [64, 32]}, "inference.tile.1: received 32; allowed: numbers from 64 on"),
        ({"inference__overlap": 1}, "inference.overlap: received 1; allowed: numbers up to 0.9"),
        ({"inference__scales": [0]}, "inference.scales.0: received 0; allowed: numbers above 0"),
        ({"name": 5}, "name: received 5; allowed: text"),
        (
            {"name": "a b"},
            "name: received \"a b\"; allowed: letters, digits, '.', '-' and '_', beginning with a letter or digit",
        ),
        ({"model": "segformer-b0"}, 'model: received "segformer-b0"; allowed: a mapping of keys to values'),
        ({"model__weights": 5}, "model.weights: received 5; allowed: text"),
        ({"classes": 5}, "classes: received 5; allowed: text, or a list"),
        ({"classes": {"road": 1}}, 'classes: received {"road": 1}; allowed: text, or a list'),
        ({"classes": ["road", 5]}, "classes.1: received 5; allowed: text"),
        ({"data": "folder"}, 'data: received "folder"; allowed: a mapping of keys to values'),
        ({"data__size": [100]}, "data.size: received [100]; allowed: a list of 2"),
        ({"data__size": [0, 3]}, "data.size.0: received 0; allowed: numbers above 0"),
        ({"data__crop": 512}, "data.crop: received 512; allowed: a list"),
        ({"data__crop": [1, 2, 3]}, "data.crop: received [1, 2, 3]; allowed: a list of 2"),
        ({"data__augment__scale": [2, 1]}, "data.augment.scale: received [2.0, 1.0]; allowed: [smallest, largest]"),
        ({"data__augment__class_crop": 2}, "data.augment.class_crop: received 2; allowed: numbers up to 1"),
        ({"data__oversample": 0}, "data.oversample: received 0; allowed: numbers above 0"),
        ({"data__oversample": 1.5}, "data.oversample: received 1.5; allowed: numbers up to 1"),
        ({"data__on_error": "ignore"}, "data.on_error: received \"ignore\"; allowed: 'stop' or 'skip'"),
        (
            {"data__train__on_error": "ignore"},
            "data.train.on_error: received \"ignore\"; allowed: 'stop' or 'skip'",
        ),
        (
            {"data__train__format": "voc"},
            "data.train.format: received \"voc\"; allowed: 'masks', 'coco', 'coco_panoptic', 'yolo', 'huggingface', "
            "'shards'",
        ),
        ({"data__train__format": NOTHING}, "data.train.format: missing; it has no default"),
        ({"data__train__masks": 5}, "data.train.masks: received 5; allowed: text"),
        ({"data__train__masks": NOTHING}, "data.train: needs both `images` and `masks` to train"),
        (
            {"data__train": {"format": "masks"}},
            "data.train: names neither `images` nor `masks`; give at least one of them",
        ),
        ({"data__train": NOTHING}, "data.train: missing; it has no default"),
        ({"data__val__uri": NOTHING}, "data.val.uri: missing; it has no default"),
        ({"storage": NOTHING}, "storage: missing; it has no default"),
        (
            {"kind": "trian"},
            'kind: received "trian"; allowed: train, tune, evaluate, predict, serve, shard, inspect, export',
        ),
        (
            {"kind": ["train"]},
            'kind: received ["train"]; allowed: train, tune, evaluate, predict, serve, shard, inspect, export',
        ),
        ({"kind": NOTHING}, "kind: missing; allowed: train, tune, evaluate, predict, serve, shard, inspect, export"),
    ],
)
def test_mistake_is_one_line_of_key_value_and_what_is_allowed(changes: dict[str, object], line: str) -> None:
    assert mistakes(changed(TRAIN, **changes)) == [line]


@pytest.mark.parametrize(
    ("changes", "key", "near"),
    [
        ({"optimizer__learning_rate": 1}, "optimizer.learning_rate", "lr"),
        ({"optimizer__wd": 1}, "optimizer.wd", "weight_decay"),
        ({"modle": {"name": "x"}}, "modle", "model"),
        ({"data__train__image": "x"}, "data.train.image", "images"),
        ({"data__augment__flips": 1}, "data.augment.flips", "flip"),
        ({"batch__global": 1}, "batch.global", "global_size"),
    ],
)
def test_unknown_key_names_its_path_and_the_nearest_key(changes: dict[str, object], key: str, near: str) -> None:
    (line,) = mistakes(changed(TRAIN, **changes))
    assert line.startswith(f"{key}: there is no such key; allowed: ")
    assert line.endswith(f"; did you mean `{near}`?")


def test_unknown_key_without_a_near_one_lists_what_is_allowed() -> None:
    assert mistakes(changed(TRAIN, batch__xyz=1)) == [
        "batch.xyz: there is no such key; allowed: global_size, per_worker"
    ]
    assert mistakes(changed(TRAIN, batch={1: 2})) == ["batch.1: there is no such key; allowed: global_size, per_worker"]


def test_all_mistakes_are_told_at_once() -> None:
    raw = changed(TRAIN, optimizer={"foo": 1, "bar": 2}, batch__per_worker=0, name=NOTHING)
    assert [line.split(":")[0] for line in mistakes(raw)] == [
        "name",
        "optimizer.foo",
        "optimizer.bar",
        "batch.per_worker",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"predictions": NOTHING}, "job: give either `bundle` or `predictions`"),
        ({"bundle": "/b"}, "job: give either `bundle` or `predictions`"),
        (
            {"data": {"format": "masks", "images": "/i"}},
            "data.masks: missing: there is no truth to score by",
        ),
        ({"predictions": NOTHING, "bundle": "/b"}, "data.images: missing: a bundle predicts from images"),
    ],
)
def test_evaluate_job_that_does_not_fit_together(changes: dict[str, object], line: str) -> None:
    assert mistakes(changed(EVALUATE, **changes)) == [line]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"output__format": "yolo"},
            "output.format: received \"yolo\"; allowed: 'coco', 'masks', 'coco_panoptic' or 'shards'",
        ),
        ({"output__format": NOTHING}, "output.format: missing; it has no default"),
        ({"data": {"format": "masks", "masks": "/m"}}, "data.images: missing: a bundle predicts from images"),
        ({"data": {"format": "coco", "annotations": "/a"}}, "data.images: missing: a bundle predicts from images"),
        ({"metrics": True}, "data.masks: missing: `metrics` need a truth to score by"),
        ({"metrics": ["boundary_iou"]}, "data.masks: missing: `metrics` need a truth to score by"),
        ({"batch__per_worker": 0}, "batch.per_worker: received 0; allowed: numbers from 1 on"),
    ],
)
def test_predict_job_that_does_not_fit_together(changes: dict[str, object], line: str) -> None:
    assert mistakes(changed(PREDICT, **changes)) == [line]


def test_predict_reads_labels_only_to_score() -> None:
    for metrics, masks, more in ((False, None, ()), (True, "/m", ()), (["boundary_iou"], "/m", ("boundary_iou",))):
        job = config.parse(changed(PREDICT, data__masks="/m", metrics=metrics))
        assert isinstance(job, PredictJob)
        assert isinstance(job.source, MasksSource)
        assert (job.source.masks, job.more_metrics) == (masks, more)


@pytest.mark.parametrize("text", ["", "- kind: train", "kind train", "5"])
def test_file_that_holds_no_mapping(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(JobError, match="a job file is a mapping of keys to values") as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["kind: [train", "kind: a: b", "a: !!python/object:os.system x", "\x00"])
def test_broken_yaml(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(JobError, match="not valid YAML") as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_key_given_twice(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the key 'name' stands twice") as caught:
        config.load(written(tmp_path, "kind: train\nname: a\nname: b\n"))
    assert "line 3" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no such file"):
        config.load(tmp_path / "nope.yaml")


# ---- environment variables


def test_environment_variables_stand_in_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "s3://other")
    monkeypatch.delenv("RUNS", raising=False)
    raw = changed(TRAIN, storage="${RUNS:-s3://bucket/fallback}", data__val__uri="${BUCKET}/val")
    path = written(tmp_path, raw | {"classes": ["${BUCKET}", "$BUCKET"]})
    job = config.load(path, ["seed=${SEED:-7}", "name=${EMPTY:-}x"])
    assert isinstance(job, TrainJob)
    assert isinstance(job.data.val, ShardsSource)
    assert job.storage == "s3://bucket/fallback"
    assert job.data.val.uri == "s3://other/val"
    assert job.classes == ("s3://other", "$BUCKET")
    assert (job.seed, job.name) == (7, "x")
    monkeypatch.setenv("RUNS", "s3://set")
    loaded = config.load(path)
    assert isinstance(loaded, TrainJob)
    assert loaded.storage == "s3://set"


def test_unset_environment_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(JobError, match=r"'\$\{NOWHERE\}/runs' needs the environment variable NOWHERE.*set it, or"):
        config.load(written(tmp_path, changed(TRAIN, storage="${NOWHERE}/runs")))
