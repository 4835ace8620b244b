"""The web page in a real browser: what it draws is what the models say, and what it exports is what we read."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import uvicorn
from PIL import Image

from raysseg import config, masks, rle, serve
from raysseg.config import CocoSource, MasksSource, ServeJob
from raysseg.data import read_class_map, read_index, read_samples
from raysseg.data.decode import decode_image
from raysseg.masks import LabelMap, MaskSet
from raysseg.predictor import Predictor
from raysseg.schema import Sample
from tests.tiny_bundles import write_bundle
from tests.tiny_sam import write_tiny_sam

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
Page = playwright.Page

SIZE = (96, 128)  # of the example's images
TOKEN = "sesame"
Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@contextmanager
def running(job: ServeJob) -> Iterator[str]:
    """Serves a job in a thread; yields its address."""
    server = uvicorn.Server(uvicorn.Config(serve.build_local_app(job), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(30)


def serve_job(models: dict[str, Any], **http: Any) -> ServeJob:
    return config.parse_as(ServeJob, {"kind": "serve", "name": "test", "models": models, "http": http, "local": True})


@pytest.fixture(scope="module")
def folder(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models: three bundles and a SAM."""
    made = tmp_path_factory.mktemp("served")
    write_bundle("semantic", example, str(made / "scenes"), seed=20)  # by these seeds, four classes are seen
    write_bundle("semantic", example, str(made / "others"), seed=4)
    write_bundle("instance", example, str(made / "things"))
    write_tiny_sam(made / "sam")
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    models: dict[str, Any] = {name: {"bundle": str(folder / name)} for name in ("scenes", "others", "things")}
    with running(serve_job({**models, "sam": {"prompt": "sam-vit-base", "weights": str(folder / "sam")}})) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on PATH")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    """Opens the page with a browser context's options; in the end nothing has gone wrong, and nothing left the server.

    With `refusals`, answers that are errors are meant to be.
    """
    complaints: list[str] = []

    def open_page(url: str = address, *, refusals: bool = False, **options: Any) -> Page:
        page = contexts.enter_context(browser.new_context(**options)).new_page()
        page.set_default_timeout(20_000)

        def hear(message: Any) -> None:
            if message.type in ("error", "warning") and not (refusals and "Failed to load resource" in message.text):
                complaints.append(message.text)

        def look(request: Any) -> None:
            if not request.url.startswith((url, "blob:", "data:")):
                complaints.append(request.url)

        page.on("console", hear)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", look)
        page.goto(url)
        return page

    with ExitStack() as contexts:
        yield open_page
    assert complaints == []


@pytest.fixture(scope="module")
def images(example: Path) -> list[Path]:
    return sorted((example / "val/images").iterdir())


def open_images(page: Page, *paths: Path, model: str = "scenes") -> None:
    page.select_option("#model-a", model)
    page.set_input_files("#file", list(paths))
    settle(page)


def settle(page: Page, model: str = "") -> None:
    """Waits until a model has answered."""
    says(page, f"{model} answered in")
    frame(page)


def frame(page: Page) -> None:
    """Waits until what was asked for is painted."""
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
    )


def says(page: Page, words: str) -> None:
    playwright.expect(page.locator("#status")).to_contain_text(words, timeout=20_000)


def slide(page: Page, slider: str, value: int) -> None:
    page.locator(slider).fill(str(value))
    frame(page)


def shown(page: Page, canvas: int = 0) -> Pixels:
    """The canvas at the middle of each of the image's pixels, (H, W, 3)."""
    script = """([place, height, width]) => {
      const canvas = document.querySelectorAll("canvas")[place];
      const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
      copy.drawImage(canvas, 0, 0);
      const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
      const found = [];
      for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
        const row = Math.floor((y + 0.5) * canvas.height / height);
        const at = 4 * (row * canvas.width + Math.floor((x + 0.5) * canvas.width / width));
        found.push(data[at], data[at + 1], data[at + 2]);
      }
      return found;
    }"""
    found: list[int] = page.evaluate(script, [canvas, *SIZE])
    return np.array(found, np.uint8).reshape(*SIZE, 3)


def listed(page: Page, key: str = "area") -> dict[str, int]:
    """The class list."""
    found: dict[str, str] = page.eval_on_selector_all(
        "#classes > li", f"(rows) => Object.fromEntries(rows.map((row) => [row.dataset.name, row.dataset.{key}]))"
    )
    return {name: int(area) for name, area in found.items()}


def predict(folder: Path, name: str, image: Path) -> LabelMap | MaskSet:
    (found,) = Predictor(str(folder / name)).predict([decode_image(image.read_bytes())])
    assert isinstance(found, LabelMap | MaskSet)
    return found


def predict_labels(folder: Path, name: str, image: Path) -> masks.IdMap:
    found = predict(folder, name, image)
    assert isinstance(found, LabelMap)
    return found.labels


def areas_of(labels: masks.IdMap, names: Sequence[str]) -> dict[str, int]:
    return {names[i]: int((labels == i).sum()) for i in np.unique(labels)}


def inner(labels: npt.NDArray[Any]) -> Mask:
    """Pixels that are no line between regions."""
    found = np.ones(labels.shape, bool)
    found[:, :-1] &= labels[:, 1:] == labels[:, :-1]
    found[:-1] &= labels[1:] == labels[:-1]
    return found


def click(page: Page, x: int, y: int, **options: Any) -> None:
    page.locator("canvas").first.click(position=place(page, x, y), **options)


def place(page: Page, x: int, y: int) -> Any:
    """Where the middle of the image's pixel lies on the canvas."""
    box = page.locator("canvas").first.bounding_box()
    assert box
    return {"x": (x + 0.5) * box["width"] / SIZE[1], "y": (y + 0.5) * box["height"] / SIZE[0]}


def asked(page: Page, act: Callable[[], object], path: str = "/prompt") -> tuple[Any, Any]:
    """What an act makes the page send there, and the answer."""
    with page.expect_response(lambda response: response.url.endswith(path)) as caught:
        act()
    answer = caught.value.json()
    frame(page)
    return caught.value.request.post_data_json, answer


def exported(page: Page, button: str) -> bytes:
    with page.expect_download() as caught:
        page.click(button)
    data: bytes = caught.value.path().read_bytes()
    return data


def to_mask(segmentation: dict[str, Any]) -> Mask:
    height, width = segmentation["size"]
    return rle.to_mask(rle.to_runs(segmentation["counts"].encode(), (height, width)), (height, width))


def read_coco(data: bytes, images: Path, folder: Path) -> list[Sample]:
    (folder / "annotations.json").write_bytes(data)
    source = CocoSource(format="coco", images=str(images), annotations=str(folder / "annotations.json"))
    samples = read_samples(read_index(source))
    return [sample for sample in samples if isinstance(sample, Sample)]


def test_a_dropped_image_is_shown_under_its_classes(
    visit: Visit, folder: Path, example: Path, images: list[Path]
) -> None:
    classes = read_class_map(str(example / "classes.json"))
    page = visit()
    assert page.locator("#model-a option").all_inner_texts() == ["scenes", "others", "things", "sam"]
    drop = """([data, name]) => {
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File([bytes], name, { type: "image/png" }));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, [base64.b64encode(images[0].read_bytes()).decode(), images[0].name])
    settle(page)
    labels = predict_labels(folder, "scenes", images[0])
    assert listed(page) == areas_of(labels, classes.names)
    assert sum(listed(page).values()) == SIZE[0] * SIZE[1]
    paste = """() => {
      const clipboardData = new DataTransfer();
      clipboardData.items.add(new File(["no image"], "words.txt", { type: "text/plain" }));
      document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
    }"""
    page.evaluate(paste)
    says(page, "That holds no image")
    plain = inner(labels)
    slide(page, "#opacity", 100)
    assert np.array_equal(shown(page)[plain], classes.palette[labels][plain])
    largest = max(listed(page), key=lambda name: listed(page)[name])
    is_largest = labels == classes.names.index(largest)
    page.locator(f"#classes > li[data-name={largest}] input").first.uncheck()
    page.mouse.move(0, 0)
    frame(page)
    unlike = (shown(page) != classes.palette[labels]).any(-1)
    assert unlike[plain & is_largest].mean() > 0.9
    assert not unlike[plain & ~is_largest & inner(np.where(is_largest, 99, labels))].any()
    slide(page, "#opacity", 0)
    truth = decode_image(images[0].read_bytes())
    assert np.abs(shown(page)[2:-2, 2:-2].astype(int) - truth[2:-2, 2:-2]).mean() < 6
    slide(page, "#opacity", 100)
    page.locator("#classes > li").nth(1).hover()
    frame(page)
    second = page.locator("#classes > li").nth(1).get_attribute("data-name")
    is_second = labels == classes.names.index(second)
    unlike = (shown(page) != classes.palette[labels]).any(-1)
    assert not unlike[plain & is_second].any()
    assert unlike[plain & ~is_second & ~is_largest].all()


def test_scores_have_a_threshold_and_instances_rows_of_their_own(
    visit: Visit, folder: Path, images: list[Path]
) -> None:
    page = visit()
    open_images(page, images[0], model="things")
    found = predict(folder, "things", images[0])
    assert isinstance(found, MaskSet)
    assert found.scores is not None
    assert sum(listed(page, "count").values()) == len(found) > 3
    middle = int(np.ceil(100 * np.median(found.scores)))
    slide(page, "#threshold", middle)
    number = int((found.scores >= middle / 100).sum())
    assert sum(listed(page, "count").values()) == number
    assert 0 < number < len(found)
    slide(page, "#threshold", 0)
    page.locator("#classes summary").first.click()
    parts = page.locator("#classes details").first.locator("li")
    assert parts.count() == page.locator("#classes > li:has(details)").first.evaluate(
        "(row) => Number(row.dataset.count)"
    )
    parts.first.get_by_role("button", name="Keep").click()
    assert page.locator("#kept li").count() == 1


def test_two_models_side_by_side_and_under_a_divider(
    visit: Visit, folder: Path, example: Path, images: list[Path]
) -> None:
    classes = read_class_map(str(example / "classes.json"))
    page = visit()
    open_images(page, images[0])
    slide(page, "#opacity", 100)
    page.select_option("#model-b", "others")
    page.wait_for_selector("#classes li[data-area-b]:not([data-area-b='0'])")
    labels = [predict_labels(folder, name, images[0]) for name in ("scenes", "others")]
    for key, expected in zip(("area", "areaB"), labels, strict=True):
        assert {name: n for name, n in listed(page, key).items() if n} == areas_of(expected, classes.names)
    divider = page.get_by_role("slider", name="Divider")
    divider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    frame(page)
    assert divider.get_attribute("aria-valuenow") == "25"
    column = SIZE[1] // 4
    both = np.where(np.arange(SIZE[1]) < column, labels[0], labels[1])
    plain = inner(labels[0]) & inner(labels[1])
    assert np.array_equal(shown(page)[plain], classes.palette[both][plain])
    page.keyboard.press("Home")
    frame(page)
    assert np.array_equal(shown(page)[plain], classes.palette[labels[1]][plain])
    handle, canvas = divider.bounding_box(), page.locator("canvas").first.bounding_box()
    assert handle
    assert canvas
    page.mouse.move(handle["x"] + 16, handle["y"] + 20)
    page.mouse.down()
    page.mouse.move(canvas["x"] + 0.75 * canvas["width"], canvas["y"] + 20)
    page.mouse.up()
    assert divider.get_attribute("aria-valuenow") in ("74", "75", "76")
    page.select_option("#mode", "beside")
    page.mouse.move(0, 0)
    frame(page)
    for number, expected in enumerate(labels):
        assert np.array_equal(shown(page, number)[plain], classes.palette[expected][plain])


def test_prompted_masks_are_kept_and_exported(visit: Visit, example: Path, images: list[Path], tmp_path: Path) -> None:
    classes = read_class_map(str(example / "classes.json"))
    page = visit()
    open_images(page, images[0], images[1], model="sam")
    slide(page, "#opacity", 100)
    sent, answer = asked(page, lambda: click(page, 40, 30))
    assert (sent["points"], sent["labels"], sent["box"]) == ([[40, 30]], [1], None)
    best = to_mask(answer["masks"][0]["segmentation"])
    page.mouse.move(0, 0)
    frame(page)
    plain = inner(best)
    plain[20:41, 30:51] = False  # the point
    assert ((shown(page) == (255, 0, 153)).all(-1) == best)[plain].all()
    sent, answer = asked(page, lambda: click(page, 100, 70, button="right"))
    assert (sent["points"], sent["labels"]) == ([[40, 30], [100, 70]], [1, 0])
    sent, _ = asked(page, lambda: click(page, 90, 20, modifiers=["Shift"]))
    assert sent["labels"] == [1, 0, 0]
    sent, answer = asked(page, lambda: page.click("#undo"))
    assert sent["labels"] == [1, 0]
    scores = [mask["score"] for mask in answer["masks"]]
    assert scores == sorted(scores, reverse=True)
    assert page.locator("#candidates b").all_inner_texts() == [f"{score:.2f}" for score in scores]
    page.locator("#candidates input").nth(1).check()
    page.fill("#name", "sheep")
    page.click("#keep")
    kept = [("sheep", answer["masks"][1])]
    start, end = place(page, 20, 10), place(page, 90, 60)
    canvas = page.locator("canvas").first
    sent, answer = asked(page, lambda: canvas.drag_to(canvas, source_position=start, target_position=end))
    assert (sent["box"], sent["points"]) == ([20, 10, 91, 61], [])
    page.fill("#name", "balloon")
    page.click("#keep")
    kept.append(("balloon", answer["masks"][0]))
    page.select_option("#image", images[1].name)
    playwright.expect(page.locator("#kept li")).to_have_count(0)
    asked(page, lambda: page.click("#everything"), "/everything")
    says(page, "The model found nothing.")  # in noise no mask is stable
    _, answer = asked(page, lambda: click(page, 64, 48))
    page.route("**/everything", lambda route: route.fulfill(json=answer), times=1)
    asked(page, lambda: page.click("#everything"), "/everything")
    areas = sorted((mask["area"] for mask in answer["masks"]), reverse=True)
    assert list(listed(page).values()) == areas
    page.fill("#name", "car")
    whole = max(answer["masks"], key=lambda mask: mask["area"])
    page.get_by_role("button", name="Keep mask 1").click()

    samples = read_coco(exported(page, "#save-coco"), example / "val/images", tmp_path)
    assert [sample.sample_id for sample in samples] == [image.stem for image in images[:2]]
    content = json.loads((tmp_path / "annotations.json").read_text())
    ids = {category["name"]: category["id"] for category in content["categories"]}
    assert ids == {**dict(zip(classes.names, classes.ids, strict=True)), "balloon": max(classes.ids) + 1}
    found = [(segment, sample) for sample in samples for segment in sample.segments or ()]
    for (segment, sample), (name, mask) in zip(found, [*kept, ("car", whole)], strict=True):
        assert segment.class_id == ids[name]
        assert (sample.height, sample.width) == SIZE
        assert segment.rle == mask["segmentation"]["counts"].encode()
        pixels = to_mask(mask["segmentation"])
        rows, columns = np.nonzero(pixels)
        edges = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
        assert (segment.area, segment.box, segment.is_crowd) == (pixels.sum(), edges, False)

    page.select_option("#image", images[0].name)
    playwright.expect(page.locator("#kept li")).to_have_count(2)
    data = exported(page, "#save-png")
    assert Image.open(io.BytesIO(data)).mode == "L"
    expected = np.zeros(SIZE, np.uint8)
    for name, mask in sorted(kept, key=lambda pair: -pair[1]["area"]):
        expected[to_mask(mask["segmentation"])] = ids[name]
    assert np.array_equal(masks.decode_id_map(data), expected)
    (tmp_path / "classes.json").write_bytes(exported(page, "#save-classes"))
    (tmp_path / "masks").mkdir()
    (tmp_path / f"masks/{images[0].stem}.png").write_bytes(data)
    read = read_class_map(str(tmp_path / "classes.json"))
    assert dict(zip(read.names, read.ids, strict=True)) == ids
    (sample,) = read_samples(read_index(MasksSource(format="masks", masks=str(tmp_path / "masks"))))
    assert isinstance(sample, Sample)
    labels = masks.to_dense(sample, read).labels
    assert np.array_equal(labels == read.names.index("sheep"), expected == ids["sheep"])
    assert "Pixels without a mask are 0" in page.inner_text("#status")


def test_an_answer_is_corrected(visit: Visit, folder: Path, example: Path, images: list[Path], tmp_path: Path) -> None:
    classes = read_class_map(str(example / "classes.json"))
    page = visit()
    open_images(page, images[0])
    page.locator("#classes button").first.press("Enter")
    assert page.locator("#classes button").first.evaluate("(button) => button === document.activeElement")
    assert page.locator("#kept li").count() == 1
    page.click("#keep-all")
    number = len(listed(page))
    assert page.locator("#kept li").count() == number
    page.click("#keep-all")
    assert page.locator("#kept li").count() == number
    names = page.eval_on_selector_all("#kept li", "(rows) => rows.map((row) => row.dataset.name)")
    page.get_by_role("button", name=f"Delete mask 2, {names[1]}").click()
    assert page.evaluate("document.activeElement.ariaLabel") == f"Delete mask 2, {names[2]}"
    first = page.get_by_label("Class of mask 1")
    first.fill("meadow")
    first.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "Correct mask 1, meadow"
    page.get_by_role("button", name=f"Correct mask 2, {names[2]}").click()
    settle(page)
    sent, answer = asked(page, lambda: click(page, 10, 10))
    labels = predict_labels(folder, "scenes", images[0])
    assert np.array_equal(to_mask(sent["mask"]), labels == classes.names.index(names[2]))
    page.keyboard.press("k")
    segments = read_coco(exported(page, "#save-coco"), example / "val/images", tmp_path)[0].segments
    assert segments is not None
    kept = [max(classes.ids) + 1, *(classes.ids[classes.names.index(name)] for name in names[2:])]
    assert [segment.class_id for segment in segments] == kept
    assert segments[1].rle == answer["masks"][0]["segmentation"]["counts"].encode()
    for segment, name in list(zip(segments, [names[0], *names[2:]], strict=True))[2:]:
        assert segment.rle == rle.from_mask(labels == classes.names.index(name))


def test_the_keyboard_alone_suffices(visit: Visit, images: list[Path]) -> None:
    page = visit()
    page.wait_for_selector("#model-a option", state="attached")

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                style = page.evaluate(
                    "getComputedStyle(document.activeElement.closest('.button') ?? document.activeElement).outlineStyle"
                )
                assert style != "none", selector
                return
        pytest.fail(f"{selector} can't be reached")

    page.keyboard.press("Tab")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    with page.expect_file_chooser() as chooser:
        tab_to("#file")
        page.keyboard.press("Enter")
    chooser.value.set_files(images[0])
    settle(page)
    tab_to("#model-a")
    page.keyboard.press("End")
    assert page.input_value("#model-a") == "sam"
    settle(page, "sam")
    tab_to("canvas")
    page.keyboard.press("Shift+ArrowRight")
    sent, _ = asked(page, lambda: page.keyboard.press("Enter"))
    assert (sent["points"], sent["labels"]) == ([[65, 48]], [1])
    page.keyboard.press("ArrowUp")
    sent, _ = asked(page, lambda: page.keyboard.press("Backspace"))
    (first, second) = sent["points"]
    assert first == [65, 48]
    assert second[1] < 48
    assert sent["labels"] == [1, 0]
    page.keyboard.press("b")
    for key in ("ArrowLeft", "ArrowUp") * 4:
        page.keyboard.press(key)
    sent, answer = asked(page, lambda: page.keyboard.press("b"))
    box = sent["box"]
    assert (box[2] - 1, box[3] - 1) == tuple(second)
    assert box[0] < box[2] - 4
    page.keyboard.press("3")
    assert page.locator("#candidates input").nth(2).is_checked()
    page.locator("#candidates input").nth(2).focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("#candidates input").nth(1).evaluate("(radio) => radio === document.activeElement")
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.id") == "name"  # which it asks for
    page.keyboard.type("kite")
    page.keyboard.press("Enter")
    assert page.locator("#kept li").get_attribute("data-area") == str(answer["masks"][1]["area"])
    page.locator("canvas").first.focus()
    asked(page, lambda: page.keyboard.press("Enter"))
    page.keyboard.press("Escape")
    assert not page.locator("#candidates").is_visible()
    tab_to("#save-coco")
    with page.expect_download():
        page.keyboard.press("Enter")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_it_all_in_both_themes(visit: Visit, images: list[Path], theme: str) -> None:
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True, color_scheme=theme, reduced_motion="reduce")

    def fits() -> bool:
        fit: bool = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        return fit

    assert fits()
    open_images(page, images[0], images[1], model="things")
    page.locator("#classes summary").first.click()
    assert fits()
    page.select_option("#model-b", "scenes")
    page.wait_for_selector("#classes li[data-area-b]:not([data-area-b='0'])")
    assert fits()
    page.select_option("#model-a", "sam")
    settle(page)
    page.click("#negative")
    page.locator("canvas").first.scroll_into_view_if_needed()
    box = page.locator("canvas").first.bounding_box()
    assert box
    sent, _ = asked(page, lambda: page.touchscreen.tap(box["x"] + 50, box["y"] + 50))
    assert sent["labels"] == [0]
    page.fill("#name", "a rather long name of a class that nobody has ever seen before")
    page.click("#keep")
    assert fits()
    page.click("#help-button")
    assert fits()
    unlabelled = "(all) => all.filter((it) => !it.labels?.length && !it.ariaLabel && !it.textContent.trim()).length"
    assert page.eval_on_selector_all("input, select, button", unlabelled) == 0
    colours: dict[str, str] = page.evaluate(
        """() => Object.fromEntries(["paper", "text", "quiet", "wash", "accent", "on-accent", "edge", "error"].map(
          (name) => [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()]))"""
    )
    assert (luminance(colours["paper"]) < 0.1) == (theme == "dark")
    for text, ground in [
        ("text", "paper"),
        ("quiet", "paper"),
        ("quiet", "wash"),
        ("on-accent", "accent"),
        ("text", "error"),
    ]:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for line in ("edge", "accent"):
        assert contrast(colours[line], colours["paper"]) >= 3, line


def luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    rgb = np.frombuffer(bytes.fromhex(digits), np.uint8) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one: str, other: str) -> float:
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_late_answers_are_dropped_and_forgotten_images_sent_again(visit: Visit, images: list[Path]) -> None:
    page = visit(refusals=True)
    open_images(page, images[0], model="sam")
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append((route, route.fetch()))

    page.route("**/prompt", hold, times=1)
    click(page, 20, 20)
    sent, second = asked(page, lambda: click(page, 90, 60))
    assert sent["points"] == [[20, 20], [90, 60]]
    area = page.locator("#candidates small").first
    expected = page.evaluate("(n) => n.toLocaleString('en').replaceAll(',', '\\u202f')", second["masks"][0]["area"])
    assert area.inner_text() == f"{expected} px"
    ((route, response),) = held
    with suppress(playwright.Error):  # the page may have given it up
        route.fulfill(response=response)
    page.wait_for_timeout(200)
    assert area.inner_text() == f"{expected} px"

    page.route("**/segment", lambda route: held.append((route, route.fetch())), times=1)
    with page.expect_request("**/segment"):
        page.select_option("#model-a", "scenes")
    page.select_option("#model-a", "sam")
    page.wait_for_timeout(300)
    with suppress(playwright.Error):
        held[-1][0].fulfill(response=held[-1][1])
    page.wait_for_timeout(200)
    assert not page.locator("#found").is_visible()

    problem = {"title": "Not Found", "status": 404, "detail": "it is not known"}
    page.route("**/prompt", lambda route: route.fulfill(status=404, json=problem), times=1)
    uploads: list[str] = []
    page.on("request", lambda request: uploads.append(request.url) if request.url.endswith("/images") else None)
    with page.expect_response(lambda response: response.url.endswith("/prompt") and response.ok):
        click(page, 50, 50)
    assert len(uploads) == 1
    assert not page.locator("#status.error").count()


def test_a_busy_server_is_asked_again_and_errors_are_told(visit: Visit, images: list[Path], tmp_path: Path) -> None:
    page = visit(refusals=True)
    busy = {"title": "Busy", "status": 503, "detail": "the queue is full"}
    page.route("**/segment", lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, json=busy), times=1)
    page.set_input_files("#file", images[0])
    says(page, "busy, retrying in 1 s")
    page.wait_for_selector("#classes li")
    Image.new("RGB", (4, 4)).save(tmp_path / "speck.png")
    with page.expect_response(lambda response: response.url.endswith("/segment")) as caught:
        page.set_input_files("#file", tmp_path / "speck.png")
    page.wait_for_selector("#status.error")
    assert page.inner_text("#status") == caught.value.json()["detail"]
    (tmp_path / "words.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "words.png")
    says(page, "words.png")
    page.route("**/segment", lambda route: route.abort())
    page.set_input_files("#file", images[1])
    says(page, "can’t be reached")


def test_a_token_is_asked_for_and_kept(
    visit: Visit, folder: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAYGROUND_TOKEN", TOKEN)
    job = serve_job({"scenes": {"bundle": str(folder / "scenes")}}, token_variable="PLAYGROUND_TOKEN")
    with running(job) as url:
        page = visit(url, refusals=True)
        dialog = page.locator("#ask")
        dialog.wait_for()
        page.keyboard.press("Escape")
        page.wait_for_selector("#status.error")
        page.set_input_files("#file", images[0])
        dialog.wait_for()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#ask-note")).to_contain_text("did not take")
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        dialog.wait_for(state="hidden")
        settle(page, "scenes")
        page.reload()
        open_images(page, images[0])
        assert not dialog.is_visible()
        page.close()


def test_files_of_one_stem_get_names_of_their_own(
    visit: Visit, example: Path, images: list[Path], tmp_path: Path
) -> None:
    page = visit()
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        shutil.copy(images[number], tmp_path / str(number) / "frame.png")
    for number, name in ((0, "frame.png"), (1, "frame-2.png"), (0, "frame.png")):
        page.set_input_files("#file", tmp_path / str(number) / "frame.png")
        playwright.expect(page.locator("#image")).to_have_value(name)
        page.wait_for_selector("#classes li")
        page.click("#keep-all")
    content = json.loads(exported(page, "#save-coco"))
    assert [image["file_name"] for image in content["images"]] == ["frame.png", "frame-2.png"]


def test_javascript_agrees_with_python_on_runs_and_masks(visit: Visit) -> None:
    page = visit()
    rng = np.random.default_rng(0)
    found = [rng.random((7, 11)) < share for share in (0.0, 0.1, 0.5, 1.0)] + [np.zeros((3000, 900), bool)]
    found[-1][100:2900, 450] = True
    encoded = [*rle.from_masks(np.stack(found[:-1])), rle.from_mask(found[-1])]
    script = "async (all) => { const { toRuns } = await import('/playground/rle.js'); return all.map(toRuns); }"
    decoded = page.evaluate(script, [counts.decode() for counts in encoded])
    for runs, counts, mask in zip(decoded, encoded, found, strict=True):
        assert runs == rle.to_runs(counts, mask.shape).tolist()

    script = """async ([kept, categories]) => {
      const { toMaskPng } = await import('/playground/export.js');
      const blob = await toMaskPng({ height: 7, width: 11, kept }, categories);
      return [...new Uint8Array(await blob.arrayBuffer())];
    }"""
    segmentation = {"size": [7, 11], "counts": encoded[1].decode()}
    kept = [{"name": "last", "area": int(found[1].sum()), "segmentation": segmentation}]
    for zero, last, nothing in (("sky", 7, 255), ("background", 7, 0), ("sky", 300, 255)):
        categories = [{"id": 0, "name": zero}, {"id": last, "name": "last"}]
        data = bytes(page.evaluate(script, [kept, categories]))
        assert np.array_equal(masks.decode_id_map(data), np.where(found[1], last, nothing))
