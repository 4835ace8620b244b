"""Which model is recommended for what, what rules it out, and the job that is written for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from raysseg import cli, config
from raysseg.advice.amounts import in_gib, to_bytes, to_seconds
from raysseg.advice.draft import to_job
from raysseg.advice.guidance import KINDS, Kind, Priority, UseCase, read_guidance
from raysseg.advice.recommend import Recommendation, recommend
from raysseg.advice.situation import DATA_KINDS, Ask
from raysseg.catalogue import MODELS, PROMPT_MODELS
from raysseg.data import FORMATS
from raysseg.findings.advice import advise
from raysseg.findings.fingerprint import Advice, ClassFacts, Fingerprint, SplitFacts, read_fingerprint
from raysseg.findings.fingerprint import Choice as Key
from raysseg.schema import InputError

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
USE_CASES: tuple[UseCase, ...] = get_args(UseCase)
FOR_TESTS = {name for name in MODELS if name.endswith("-tiny") and name != "mask2former-swin-tiny"}


def class_facts(name: str, share: float, **changes: Any) -> ClassFacts:
    weights = {"median_frequency": 1.0}
    facts = ClassFacts(
        name, 0, round(share * 10**8), share, 900, 2000, 5000.0, 100, 900, 1000, 20.0, False, False, weights
    )
    return replace(facts, **changes)


def fingerprint(source: Mapping[str, Any] | None = None, **changes: Any) -> Fingerprint:
    """Of 1,000 images of 480x360 with two classes, neither small nor rare."""
    split = SplitFacts(
        name="train",
        num_samples=1000,
        num_usable=1000,
        sizes=[(360, 480, 1000)],
        height=(360, 360, 360),
        width=(480, 480, 480),
        modes={"RGB": 1000},
        labelled_pixels=10**8,
        ignored_pixels=0,
        classes=[class_facts("ground", 0.7), class_facts("thing", 0.3)],
        instance_areas={},
        area_histogram=[],
        cooccurrence=[],
        dominant="ground",
        dominant_share=0.7,
        verdict="",
    )
    given = dict(source or {"format": "masks", "images": "/d/images", "masks": "/d/masks"})
    task = DATA_KINDS[given["format"]][0]
    assert task != "prompt"
    remarks = ["Good.", "Try loss.tversky."]
    keys = [
        Key("data.crop", [352, 480], "It fits."),
        Key("loss.dice", 0.5, "Small."),
        Key("checkpoint.metric", "val/miou", ""),
    ]
    data = {"train": given, "val": given}
    split = replace(split, **changes)
    return Fingerprint("streets", task, [], 255, data, ["ground", "thing"], [split], [], Advice(keys, remarks))


def best(found: Fingerprint | None = None, **asked: Any) -> str:
    return recommend(Ask(**asked), found).models[0].name


def in_guide(row: str) -> list[str]:
    """The first model that the guide names in each column of a row."""
    page = (Path(__file__).parents[2] / "docs/choosing.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {row} |"))
    return [cell.split("`")[1] for cell in line.split("|")[2:-1] if "`" in cell]


# --- the table ----------------------------------------------------------------------------------------------------


def test_table_names_every_model_and_no_other() -> None:
    guidance = read_guidance()
    assert set(guidance.kinds) == (MODELS.keys() - FOR_TESTS) | PROMPT_MODELS.keys()
    patterns = [*guidance.models, *(name for rule in guidance.rules for name in rule.models)]
    assert [p for p in patterns if not any(fnmatchcase(name, p) for name in guidance.kinds)] == []


def test_rules_hold_somewhere_and_say_why() -> None:
    guidance = read_guidance()
    known = {*KINDS, *PRIORITIES, *USE_CASES, *guidance.data}
    for rule in guidance.rules:
        assert set(rule.when) <= known, rule
        (kind,) = set(rule.when) & set(KINDS)
        named = [name for name in guidance.kinds if any(fnmatchcase(name, each) for each in rule.models)]
        assert named
        assert all(kind in guidance.kinds[name] for name in named), rule
        assert rule.points
        assert rule.reason.strip()
        assert rule.source.strip()
    for remark in guidance.remarks:
        assert set(remark.when) <= known, remark


def test_every_model_has_points_for_each_of_its_tasks() -> None:
    guidance = read_guidance()
    for name, kinds in guidance.kinds.items():
        for kind in kinds:
            assert guidance.rules_for(name, {kind}), (name, kind)


def test_licences_are_known_by_name() -> None:
    guidance = read_guidance()
    assert {start.licence for start in guidance.models.values()} - {None} == set(guidance.licences)
    assert all(guidance.start_of(f"segformer-b{i}").licence == "nvidia" for i in range(6))
    assert guidance.licences["nvidia"].is_commercial is False


def test_every_format_says_what_it_is_for() -> None:
    assert DATA_KINDS.keys() == FORMATS.keys()


def test_sources_in_the_docs_are_there() -> None:
    root = Path(__file__).parents[2]
    guidance = read_guidance()
    for source in {each.source for each in (*guidance.rules, *guidance.remarks)}:
        for page, _, heading in (part.partition(", ") for part in source.split("; ") if part.startswith("docs/")):
            text = (root / page).read_text()
            assert not heading or f"## {heading}" in text, source


# --- the ranking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize(("priority", "use_case"), list(product([None, *PRIORITIES], [None, *USE_CASES])))
def test_everything_can_be_asked(kind: Kind | None, priority: Priority | None, use_case: UseCase | None) -> None:
    found = recommend(Ask(kind, priority, use_case))
    assert found.task == kind or kind is None
    points = [model.points for model in found.models]
    assert points == sorted(points, reverse=True)
    names = [model.name for model in found.models] + [entry.name for entry in found.excluded]
    assert sorted(names) == sorted(read_guidance().kinds)
    assert all(model.points == sum(reason.points for reason in model.reasons) for model in found.models)
    assert any(text.startswith("--task") for text in found.presumed) == (kind is None)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "segformer-b0"),
        ({"priority": "accuracy"}, "segformer-b5"),
        ({"priority": "speed"}, "segformer-b0"),
        ({"use_case": "medical"}, "unet"),
        ({"use_case": "driving"}, "segformer-b0"),
        ({"use_case": "inspection"}, "segformer-b0"),
        ({"kind": "instance"}, "maskrcnn-resnet50-fpn"),
        ({"kind": "instance", "priority": "accuracy"}, "rfdetr-seg-2xlarge"),
        ({"kind": "instance", "priority": "small-objects"}, "maskrcnn-resnet50-fpn"),
        ({"kind": "panoptic"}, "mask2former-swin-tiny"),
        ({"kind": "panoptic", "priority": "accuracy"}, "eomt-large"),
        ({"priority": "interactive"}, "sam2.1-hiera-small"),
        ({"use_case": "editing"}, "sam2.1-hiera-small"),
        ({"kind": "prompt", "priority": "accuracy"}, "sam2.1-hiera-large"),
    ],
    ids=str,
)
def test_first_choices(asked: dict[str, Any], expected: str) -> None:
    assert best(**asked) == expected


@pytest.mark.parametrize(
    ("row", "asked"),
    [("to begin with", {}), ("the most accurate", {"priority": "accuracy"}), ("the quickest", {"priority": "speed"})],
)
def test_the_guide_says_the_same(row: str, asked: dict[str, Any]) -> None:
    assert in_guide(row) == [best(kind=kind, **asked) for kind in KINDS]


def test_the_guide_says_the_same_of_few_images() -> None:
    sources = zip(KINDS, ("masks", "coco", "coco_panoptic"), strict=False)
    found = [best(fingerprint(SOURCES[source], num_usable=300), kind=kind) for kind, source in sources]
    assert in_guide("fewer than 500 images")[:3] == found


def test_dc5_is_above_other_detrs_for_small_objects() -> None:
    found = recommend(Ask("panoptic", "small-objects"))
    names = [model.name for model in found.models]
    assert names.index("detr-resnet-50-dc5") < names.index("detr-resnet-50")
    assert names.index("detr-resnet-50-dc5") < 3
    assert any("data.size: null" in text for text in found.remarks)


def test_data_move_the_ranking() -> None:
    assert best(fingerprint()) == "segformer-b0"
    few = recommend(Ask(), fingerprint(num_usable=367))
    assert few.models[0].name == "unet"
    assert few.situation["few-images"] == "367 images"
    coco = {"format": "coco", "annotations": "/d/x.json", "images": "/d/images"}
    assert best(fingerprint(coco)) == "maskrcnn-resnet50-fpn"
    crowds = fingerprint(coco, classes=[class_facts("nucleus", 1.0, instances=200_000)], dominant_share=1.0)
    situation = recommend(Ask(), crowds).situation
    assert situation == {"instance": "the task", "crowded": "200 instances an image"}  # of one class, none dominates
    assert "crowded" not in recommend(Ask("semantic"), crowds).situation  # no rule for semantic labels asks for it
    ranked = {model.name: model.points for model in recommend(Ask(), crowds).models}
    assert ranked["maskrcnn-resnet50-fpn"] - ranked["detr-resnet-50"] >= 8


@pytest.mark.parametrize(
    ("changes", "name", "evidence"),
    [
        ({"num_usable": 499}, "few-images", "499 images"),
        ({"num_usable": 10_000}, "many-images", "10,000 images"),
        ({"classes": [class_facts("pole", 0.1, is_thin=True)]}, "thin", "narrower than 4 pixels: pole"),
        ({"classes": [class_facts("dot", 0.1, instances=10, small=6)]}, "small-objects", "60% of the instances are"),
        ({"dominant_share": 0.95}, "imbalanced", "ground fills 95% of the pixels"),
        ({"width": (1, 2048, 3000)}, "large-images", "images of 2048x360"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_situation_follows_from_the_data(changes: dict[str, Any], name: str, evidence: str) -> None:
    assert name not in recommend(Ask(), fingerprint()).situation
    assert recommend(Ask(), fingerprint(**changes)).situation[name].startswith(evidence)


def test_inspecting_names_further_loss_terms_where_they_fit() -> None:
    def named(**changes: Any) -> set[str]:
        remarks = " ".join(advise(fingerprint(**changes).train, []).remarks)
        return {name for name in ("boundary", "tversky", "lovasz") if f"loss.{name}" in remarks}

    assert named() == set()
    assert named(classes=[class_facts("ground", 0.9), class_facts("pole", 0.1, is_thin=True)]) == {"boundary"}
    assert named(dominant_share=0.95) == {"tversky"}
    uneven = [class_facts("ground", 0.5), class_facts("road", 0.48), class_facts("car", 0.02)]
    assert named(classes=uneven, dominant_share=0.5) == {"lovasz"}
    assert named(dominant_share=1.0, classes=[class_facts("nucleus", 1.0, is_thin=True)]) == set()


def test_masks_can_not_be_trained_as_instances() -> None:
    with pytest.raises(InputError, match=r"--task: instance can't be trained from the format masks; allowed: semantic"):
        recommend(Ask("instance"), fingerprint())
    assert recommend(Ask("prompt"), fingerprint()).task == "prompt"


def test_other_tasks_say_what_brings_models_back() -> None:
    found = {entry.name: entry for entry in recommend(Ask("semantic")).excluded}
    assert found["maskrcnn-resnet50-fpn"].mend == "--task instance"
    of_masks = {entry.name: entry for entry in recommend(Ask(), fingerprint()).excluded}
    assert of_masks["maskrcnn-resnet50-fpn"].mend == "--task instance, and labels for it"
    assert "answers prompts" in found["sam-vit-base"].reason


# --- costs --------------------------------------------------------------------------------------------------------


def test_costs_are_tabulated_for_every_model_that_is_trained() -> None:
    for kind in KINDS[:-1]:
        for model in recommend(Ask(kind)).models:
            assert model.cost is not None, model.name
            assert model.cost.latency_s is None
            assert model.cost.batch is None


def test_of_equal_points_the_fewer_flops_come_first() -> None:
    ranked = (pairwise(recommend(Ask(kind)).models) for kind in KINDS[:-1])
    pairs = [(one, other) for models in ranked for one, other in models if one.points == other.points]
    assert len(pairs) > 5
    assert all(one.cost and other.cost and one.cost.flops <= other.cost.flops for one, other in pairs)


def test_memory_rules_out_and_says_what_brings_back() -> None:
    found = recommend(Ask("panoptic", memory=6 * 2**30))
    out = {entry.name: entry for entry in found.excluded if "training takes" in entry.reason}
    assert {"detr-resnet-50", "detr-resnet-50-dc5"} <= out.keys()
    assert "mask2former-swin-tiny" not in out
    entry = out["detr-resnet-50"]
    assert entry.reason.endswith("for one image of 512x512, of 6 GiB")
    memory, crop = re.findall(
        r"^--gpu-memory (\w+), data\.crop: (\[\d+, \d+\]), perhaps model\.checkpoint", entry.mend
    )[0]
    names = [model.name for model in recommend(Ask("panoptic", memory=to_bytes(memory, ""))).models]
    assert entry.name in names
    smaller = fingerprint(SOURCES["coco_panoptic"])
    smaller = replace(smaller, advice=Advice([Key("data.crop", json.loads(crop), "")], []))
    assert entry.name in [model.name for model in recommend(Ask("panoptic", memory=6 * 2**30), smaller).models]


def test_the_batch_that_fits_goes_into_the_job() -> None:
    data = fingerprint(num_usable=300)
    for memory, expected in ((4, range(1, 16)), (80, [16])):
        answer = recommend(Ask(memory=memory * 2**30), data)
        job = config.parse(yaml.safe_load(to_job(answer, data)))
        assert isinstance(job, config.TrainJob)
        cost = answer.models[0].cost
        assert cost is not None
        assert job.batch.per_worker == cost.batch
        assert cost.batch in expected
        assert cost.training_bytes(cost.batch or 0) < memory * 2**30
    job = config.parse(yaml.safe_load(to_job(recommend(Ask(), data), data)))
    assert isinstance(job, config.TrainJob)
    assert job.batch.per_worker == config.AUTO


def test_latency_rules_out_on_the_gpu_that_is_named() -> None:
    slow, fast = (recommend(Ask("panoptic", latency_s=0.02, gpu=gpu)) for gpu in ("T4", "h100"))
    assert {entry.name for entry in fast.excluded} < {entry.name for entry in slow.excluded}
    assert [model.name for model in fast.models if model.name not in {m.name for m in slow.models}]
    assert all(model.cost and model.cost.latency_s and model.cost.latency_s <= 0.02 for model in fast.models)
    assert any("estimate" in text and "--measure" in text for text in fast.unsure)
    entry = next(entry for entry in slow.excluded if "ms an image of 512x512, more than 20ms" in entry.reason)
    latency = entry.mend.removeprefix("--latency ").partition(",")[0]
    again = recommend(Ask("panoptic", latency_s=to_seconds(latency, ""), gpu="T4"))
    assert entry.name in [model.name for model in again.models]


def test_larger_images_take_longer() -> None:
    small, large = (recommend(Ask(gpu="A10G"), fingerprint(width=(w, w, w))).models[0].cost for w in (480, 960))
    assert small
    assert large
    assert large.latency_s == pytest.approx(2 * (small.latency_s or 0))


def test_a_gpu_is_presumed_for_latency_and_must_be_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--gpu A10G, for the latency" in recommend(Ask(latency_s=1.0)).presumed
    assert "known: T4" in refused(capsys, "--gpu", "abacus")


def test_prompted_models_are_not_ruled_out_by_costs() -> None:
    found = recommend(Ask("prompt", memory=2**30, latency_s=1e-3))
    assert len(found.models) == len(PROMPT_MODELS)
    assert any("are not tabulated" in text for text in found.unsure)


def test_speed_counts_doublings_of_flops() -> None:
    for model in recommend(Ask("semantic", "speed")).models:
        slower = [reason for reason in model.reasons if "times the FLOPs of segformer-b0" in reason.reason]
        assert len(slower) == (model.name != "segformer-b0")
        assert all(reason.points < 0 for reason in slower)


# --- jobs ---------------------------------------------------------------------------------------------------------


SOURCES = {
    "masks": {"format": "masks", "images": "/d/images", "masks": "/d/masks"},
    "coco": {"format": "coco", "annotations": "/d/x.json", "images": "/d/images"},
    "coco_panoptic": {"format": "coco_panoptic", "annotations": "/d/x.json", "masks": "/d/p", "images": "/d/images"},
}


@pytest.mark.parametrize(
    ("source", "kind"), [(name, kind) for name in SOURCES for kind in DATA_KINDS[name] if kind != "prompt"]
)
def test_a_train_job_can_be_written_for_every_model(source: str, kind: Kind) -> None:
    data = fingerprint(SOURCES[source], num_usable=300)
    answer = recommend(Ask(kind), data)
    for place in range(len(answer.models)):
        turned = replace(answer, models=[*answer.models[place:], *answer.models[:place]])
        text = to_job(turned, data)
        job = config.parse(yaml.safe_load(text))
        assert isinstance(job, config.TrainJob)
        assert (job.task, job.model.name) == (kind, turned.models[0].name)
        assert job.model.weights == turned.models[0].weights
        assert job.data.crop == (352, 480)
        assert (job.data.train.background == "background") == (source == "coco" and kind == "semantic")
        assert (job.loss.dice == 0.5) == (not MODELS[job.model.name].has_own_loss)
        assert ("loss.tversky" in text) == (not MODELS[job.model.name].has_own_loss)
        for reason in turned.models[0].reasons:
            assert f"# {reason.points:+d}  {reason.reason}" in text


@pytest.mark.parametrize("name", PROMPT_MODELS)
def test_a_serve_job_can_be_written_for_every_prompted_model(name: str) -> None:
    answer = recommend(Ask("prompt"))
    turned = replace(answer, models=[model for model in answer.models if model.name == name])
    job = config.parse(yaml.safe_load(to_job(turned, None)))
    assert isinstance(job, config.ServeJob)
    served = job.models["sam"]
    assert isinstance(served, config.ServedPrompt)
    assert (served.prompt, served.weights) == (name, PROMPT_MODELS[name])


def test_a_job_wants_data_and_a_model() -> None:
    answer = recommend(Ask("semantic"))
    with pytest.raises(InputError, match="a train job wants data"):
        to_job(answer, None)
    with pytest.raises(InputError, match="every model is ruled out"):
        to_job(replace(answer, models=[]), fingerprint())


# --- the command line ---------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["recommend", *arguments, "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["recommend", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_json_and_written_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, job = tmp_path / "fingerprint.json", tmp_path / "job.yaml"
    file.write_text(json.dumps(asdict(fingerprint(num_usable=300))))
    shown = run(capsys, str(file), "--use-case", "medical", "--write-job", str(job))
    assert shown["kind"] == "recommend"
    assert set(shown) == {"kind", "job", *(field for field in Recommendation.__dataclass_fields__)}
    model = shown["models"][0]
    assert {"name", "weights", "licence", "points", "reasons", "cost"} == set(model)
    assert all({"points", "reason", "source"} == set(reason) for reason in model["reasons"])
    assert all({"name", "reason", "mend"} == set(entry) for entry in shown["excluded"])
    loaded = config.load(job)
    assert isinstance(loaded, config.TrainJob)
    assert loaded.model.name == model["name"] == "unet"


def test_text_says_why_the_first_is_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recommend", "--task", "instance"]) == 0
    text = capsys.readouterr().out
    assert "1. maskrcnn-resnet50-fpn  6 points, 1 ahead of rfdetr-seg-" in text
    assert "+6  the standard" in text
    assert "models are for other tasks: --task semantic" in text
    assert "presumed:" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("text", ["12", "12Gib/s", "GiB", "-3GiB", "0GiB", "12 parsecs"])
def test_amounts_need_units(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, f"--gpu-memory={text}")
    assert f"--gpu-memory: received {text!r}" in message
    assert "such as 12GiB" in message
    assert f"--latency: received {text!r}" in refused(capsys, f"--latency={text}")


def test_amounts() -> None:
    assert to_bytes("12GiB", "") == 12 * 2**30
    assert to_bytes("1.5 gb", "") == 1_500_000_000
    assert to_seconds("50ms", "") == pytest.approx(0.05)
    assert in_gib(3 * 2**29) == "1.5 GiB"


@pytest.mark.parametrize("option", ["--task", "--priority", "--use-case"])
def test_unknown_choices(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["recommend", option, "gardening"])
    assert ended.value.code == 2
    assert "invalid choice: 'gardening'" in capsys.readouterr().err


def test_choices_are_the_tables() -> None:
    parser = cli._parser()
    for option, names in (("--task", KINDS), ("--priority", PRIORITIES), ("--use-case", USE_CASES)):
        for name in names:
            assert parser.parse_args(["recommend", option, name])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"kind": "train"}', '{"name": "x", "task": "semantic"}'],
)
def test_files_that_are_no_fingerprint(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fingerprint.json"
    path.write_text(content)
    message = refused(capsys, str(path))
    assert f"{path}: not a fingerprint of this version (" in message
    assert "`raysseg inspect` writes fingerprint.json" in message


def test_fingerprint_with_a_wrong_value_names_it(tmp_path: Path) -> None:
    raw = json.loads(json.dumps(asdict(fingerprint())))
    raw["splits"][0]["num_usable"] = "many"
    (tmp_path / "fingerprint.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"splits\.0\.num_usable"):
        read_fingerprint(str(tmp_path / "fingerprint.json"))


def test_missing_file_and_folder_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.json" in refused(capsys, str(tmp_path / "nowhere.json"))
    assert "holds neither images/ and masks/ nor train/ with both" in refused(capsys, str(tmp_path))
