"""The HTTP interface in this process: every form against Predictor, every bad body, tokens, URIs, moving on."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, Response
from PIL import Image
from starlette.testclient import TestClient

from raysseg import masks, report, rle, storage
from raysseg.config import ServeJob, compose
from raysseg.data.decode import Pixels, decode_image
from raysseg.masks import LabelMap, MaskSet, SegmentMap
from raysseg.predictor import Predictor
from raysseg.schema import InputError, Task
from raysseg.serve import build_local_app, read_job
from raysseg.serve.intake import check_image
from raysseg.serve.segment import Segmenter
from tests.tiny_bundles import MODELS, write_bundle
from tests.tiny_sam import write_tiny_sam

Post = Callable[..., Any]


@pytest.fixture(scope="module")
def bundles(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, str]:
    folder = tmp_path_factory.mktemp("bundles")
    for task in MODELS:
        write_bundle(task, example, str(folder / task))
    return {task: str(folder / task) for task in MODELS}


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sam")
    write_tiny_sam(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photo(example: Path) -> bytes:
    return min((example / "val/images").iterdir()).read_bytes()


def job_of(models: dict[str, Any], **keys: Any) -> ServeJob:
    job = compose({"kind": "serve", "name": "street", "local": True, "models": models, **keys}, [])
    assert isinstance(job, ServeJob)
    return job


@pytest.fixture(scope="module")
def client(bundles: dict[Task, str], sam: str) -> Iterator[TestClient]:
    models: dict[str, Any] = {task: {"bundle": uri, "batch_pixels": 100_000} for task, uri in bundles.items()}
    with TestClient(build_local_app(job_of({**models, "sam": {"prompt": "sam-vit-base", "weights": sam}}))) as client:
        yield client


def png(pixels: np.ndarray[Any, Any] | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def to_mask(segmentation: dict[str, Any]) -> rle.Mask:
    size = (segmentation["size"][0], segmentation["size"][1])
    return rle.to_mask(rle.to_runs(segmentation["counts"].encode(), size), size)


# --- bundles ------------------------------------------------------------------------------------------------------


def test_cards(client: TestClient) -> None:
    cards = client.get("/v1/models").json()["models"]
    assert [(card["name"], card["kind"], card["task"]) for card in cards] == [
        *((task, "segment", task) for task in MODELS),
        ("sam", "prompt", None),
    ]
    assert cards[0]["classes"][0] == {"id": 1, "name": "sky", "colour": [112, 184, 240], "isthing": False}
    assert client.get("/v1/models/semantic").json() == cards[0]


@pytest.mark.parametrize("task", MODELS)
def test_every_form_says_what_the_predictor_says(
    client: TestClient, bundles: dict[Task, str], photo: bytes, task: Task
) -> None:
    predictor, image = Predictor(bundles[task]), decode_image(photo)
    (view,) = predictor.predict([image])
    classes = predictor.bundle.classes

    def ask(form: str) -> Any:
        answer = client.post(f"/v1/models/{task}/segment", params={"as": form}, files={"image": ("a", photo)})
        assert answer.status_code == 200, answer.text
        return answer

    answer = ask("json").json()
    assert (answer["model"], answer["task"], answer["height"], answer["width"]) == (task, task, *image.shape[:2])
    names = dict(zip(classes.ids, classes.names, strict=True))
    for number, segment in enumerate(answer["segments"], 1):
        mask = to_mask(segment["segmentation"])
        assert segment["id"] == number
        assert segment["category"] == names[segment["category_id"]]
        assert segment["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        x, y, width, height = segment["bbox"]
        assert (x, y, x + width - 1, y + height - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
        assert (mask == expected_mask(view, number, classes.index_of[segment["category_id"]])).all()
    ids = masks.decode_id_map(ask("ids").content)
    if isinstance(view, LabelMap):
        assert (ids == masks.to_ids(view.labels, classes)).all()
    else:
        assert (ids == masks.to_numbers(masks.to_sample("", view, classes))[0]).all()
    labels, regions = report.flatten(view, classes)
    overlay = np.array(Image.open(io.BytesIO(ask("overlay").content)))
    assert (overlay == report.paint_labels(image, labels, classes, regions)).all()
    collection = ask("polygons").json()
    assert collection["type"] == "FeatureCollection"
    assert [feature["id"] for feature in collection["features"]] == [segment["id"] for segment in answer["segments"]]
    assert collection["features"][0]["properties"]["area"] == answer["segments"][0]["area"]


def expected_mask(view: LabelMap | MaskSet | SegmentMap, number: int, index: int) -> rle.Mask:
    if isinstance(view, LabelMap):
        return view.labels == index
    return view.masks[number - 1] if isinstance(view, MaskSet) else view.numbers == number


def test_an_image_comes_in_any_wrapping(client: TestClient, photo: bytes) -> None:
    url = "/v1/models/semantic/segment"
    answers = [
        client.post(url, files={"image": ("a.png", photo)}),
        client.post(url, content=photo, headers={"content-type": "image/png"}),
        client.post(url, content=photo, headers={"content-type": "application/octet-stream"}),
        client.post(url, content=iter([photo[:100], photo[100:]]), headers={"content-type": "image/png"}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.content for answer in answers}) == 1
    assert (
        client.post(url, content=photo, headers={"content-type": "image/png", "accept": "image/png"}).content[1:4]
        == b"PNG"
    )


def test_many_at_once_get_the_same_as_one(client: TestClient, example: Path) -> None:
    photos = [path.read_bytes() for path in sorted((example / "val/images").iterdir())]
    alone = [
        client.post("/v1/models/semantic/segment?as=ids", files={"image": ("a", photo)}).content for photo in photos
    ]
    together: dict[int, bytes] = {}

    def ask(i: int) -> None:
        together[i] = client.post("/v1/models/semantic/segment?as=ids", files={"image": ("a", photos[i])}).content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(photos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = [(masks.decode_id_map(together[i]) == masks.decode_id_map(alone[i])).mean() for i in range(len(photos))]
    assert min(same) > 0.999  # sums of a batch round otherwise


# --- bad bodies ---------------------------------------------------------------------------------------------------

RGB = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
ANOTHER = {"save_all": True, "append_images": [Image.fromarray(255 - RGB)]}
BOMB = png(Image.new("1", (30_000, 30_000)))

BAD_IMAGES = {
    "nothing": (b"", 415, "is empty"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, 'begins with b"<svg'),
    "HTML": (b"<!doctype html><script>", 415, "allowed: JPEG, PNG"),
    "pickle": (b"\x80\x04\x95\x0c\x00\x00\x00", 415, "of no kind that is taken"),
    "GIF": (png(RGB, "GIF", **ANOTHER), 415, "begins with b'GIF87a2', which"),
    "animated WebP": (png(RGB, "WEBP", **ANOTHER), 415, "several pages"),
    "pages": (png(RGB, "TIFF", **ANOTHER), 415, "several pages"),
    "CMYK": (png(Image.fromarray(RGB).convert("CMYK"), "JPEG"), 415, "mode CMYK"),
    "16 bit": (png(np.zeros((40, 50), np.uint16)), 415, "mode I;16"),
    "16 bit RGB": (cv2.imencode(".png", np.zeros((40, 50, 3), np.uint16))[1].tobytes(), 415, "RGB, 16 bits"),
    "16 bit RGB TIFF": (cv2.imencode(".tif", np.zeros((40, 50, 3), np.uint16))[1].tobytes(), 415, "RGB, 16 bits"),
    "float": (png(np.zeros((40, 50), np.float32), "TIFF"), 415, "mode F"),
    "1x1": (png(RGB[:1, :1]), 422, "is 1x1; allowed: sides from 8"),
    "a line": (png(RGB[:1]), 422, "is 50x1"),
    "30k x 30k": (BOMB, 413, "too many pixels"),
    "a little too large": (png(Image.new("1", (9000, 9000))), 413, "too many pixels"),
    "a strip": (png(Image.new("1", (300_000, 8))), 413, "too many pixels"),  # 64 rows of which models see
    "truncated PNG": (png(RGB)[:-200], 422, "truncated"),
    "truncated JPEG": (png(RGB, "JPEG")[:-200], 422, "can't be decoded"),
    "truncated head": (png(RGB)[:20], 415, ""),
    "scans": (png(RGB, "JPEG", progressive=True)[:-2] + b"\xff\xda" * 200 + b"\xff\xd9", 415, "more than 100 scans"),
    "damaged": (png(RGB)[:100] + b"\0" * 400 + png(RGB)[500:], 422, "can't be"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("url", ["/v1/models/semantic/segment", "/v1/models/sam/images"])
def test_what_is_no_image_that_is_taken(client: TestClient, photo: bytes, name: str, url: str) -> None:
    data, status, reason = BAD_IMAGES[name]
    answer = client.post(url, files={"image": ("a.png", data)})
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert answer.status_code == status or (name == "truncated head" and answer.status_code == 422)
    assert reason in problem["detail"]
    assert client.post(url, files={"image": ("a.png", photo)}).status_code in (200, 201)


PROMPT_PART = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n+2AA-\r\n--x--\r\n'
TEXT_PART = b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\nabc\r\n--x--\r\n'


@pytest.mark.parametrize(
    ("content", "kind", "status", "reason"),
    [
        (b"{", "application/json", 400, "can't be read"),
        (b"[1]", "application/json", 400, "send one object"),
        (b'{"a":' + b"[" * 100_000, "application/json", 400, "can't be read"),
        (b'{"uri": "https://["}', "application/json", 403, "not allowed"),
        (b"{" + b" " * 2**21 + b"}", "application/json", 413, "too large"),
        (b"{}", "application/json", 400, "there is no image"),
        (b'{"uri": "https://example.org/a.png"}', "application/json", 403, "none here"),
        (b'{"uri": "file:///etc/passwd"}', "application/json", 403, "not allowed"),
        (b"abc", "text/plain", 415, "received text/plain"),
        (b"abc", "", 415, "no Content-Type"),
        (b"abc", "multipart/form-data", 400, "multipart body"),
        (b"abc", "multipart/form-data; boundary=x", 400, ""),
        (TEXT_PART, "multipart/form-data; boundary=x", 400, "is text"),
        (TEXT_PART, "multipart/form-data; boundary=x; charset=undefined", 400, "can't be read"),
        (PROMPT_PART, "multipart/form-data; boundary=x; charset=utf-7", 400, "can't be read"),
    ],
)
def test_what_is_no_body(client: TestClient, content: bytes, kind: str, status: int, reason: str) -> None:
    answer = client.post("/v1/models/semantic/segment", content=content, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["detail"]


def test_wrong_turns(client: TestClient, photo: bytes) -> None:
    files = {"image": ("a", photo)}
    assert "allowed: semantic, instance, panoptic, sam" in client.get("/v1/models/nix").json()["detail"]
    assert client.post("/v1/models/nix/segment", files=files).status_code == 404
    assert "no such action" in client.post("/v1/models/sam/segment", files=files).json()["detail"]
    assert "no such action" in client.post("/v1/models/semantic/prompt", files=files).json()["detail"]
    assert client.post("/v1/models/semantic/segment", files=files, headers={"accept": "text/html"}).status_code == 406
    assert client.post("/v1/models/semantic/segment?as=svg", files=files).status_code == 400
    for answer in (client.get("/v1/models/semantic/segment"), client.get("/v1/nix")):
        assert answer.status_code in (404, 405)
        assert answer.headers["content-type"] == "application/problem+json"


def test_limits_of_bytes(bundles: dict[Task, str], photo: bytes) -> None:
    app = build_local_app(job_of({"a": {"bundle": bundles["semantic"]}}, http={"max_bytes": 1024}))
    with TestClient(app) as client:
        url, kind = "/v1/models/a/segment", {"content-type": "image/png"}
        assert client.post(url, content=photo, headers=kind).status_code == 413
        assert client.post(url, content=iter([photo]), headers=kind).status_code == 413  # its length is not announced
        assert (
            client.post(url, content=iter([b" "] * 2000), headers={"content-type": "application/json"}).status_code
            == 413
        )
        small = png(np.zeros((64, 64, 3), np.uint8))
        assert client.post(url, content=small, headers=kind).status_code == 200
        boundary = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
        form = {"content-type": "multipart/form-data; boundary=x"}
        assert client.post(url, content=iter([boundary, photo, b"\r\n--x--\r\n"]), headers=form).status_code == 413


def test_a_model_that_sees_whole_images_bounds_them_itself(bundles: dict[Task, str]) -> None:
    uri, small, large = bundles["semantic"], png(np.zeros((64, 64, 3), np.uint8)), png(np.zeros((64, 80, 3), np.uint8))
    models: dict[str, Any] = {
        "whole": {"bundle": uri, "max_pixels": 64 * 64},
        "larger": {"bundle": uri, "max_pixels": 64 * 64, "inference": {"scales": [0.5, 2.0]}},
        "tiled": {"bundle": uri, "max_pixels": 64 * 64, "inference": {"tile": [64, 64]}},
        "usual": {"bundle": uri},
    }
    with TestClient(build_local_app(job_of(models))) as client:

        def ask(name: str, image: bytes) -> Any:
            return client.post(f"/v1/models/{name}/segment", files={"image": ("a", image)})

        assert [ask(name, small).status_code for name in models] == [200, 413, 200, 200]
        assert [ask(name, large).status_code for name in models] == [413, 413, 200, 200]
        assert "would see 80x64 pixels at once; allowed: 4096. Scale" in ask("whole", large).json()["detail"]
        assert "would see 128x128" in ask("larger", small).json()["detail"]
        photo = png(Image.new("RGB", (2100, 2000)), "JPEG")
        assert "allowed: 4000000" in ask("usual", photo).json()["detail"]  # at once, not in a minute


def test_the_head_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    http = job_of({"a": {"bundle": "/b"}}).http
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        check_image(png(RGB, kind), http)


# --- who may ask, and for what ------------------------------------------------------------------------------------


def test_the_token(bundles: dict[Task, str], photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of({"a": {"bundle": bundles["semantic"]}}, http={"token_variable": "SERVE_TOKEN"})
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    with pytest.raises(InputError, match="SERVE_TOKEN is not set"):
        build_local_app(job)
    monkeypatch.setenv("SERVE_TOKEN", "sésame")
    with pytest.raises(InputError, match="printable ASCII"):
        build_local_app(job)
    monkeypatch.setenv("SERVE_TOKEN", "sesame\n")
    with TestClient(build_local_app(job)) as client:
        for header in (None, "Bearer open", "sesame", "Basic sesame", "Bearer sésame", "Bearer sesame "):
            headers = {"authorization": header.encode()} if header else {}
            answer = client.get("/v1/models", headers=headers)  # type: ignore[arg-type]
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        allowed = {"authorization": "Bearer sesame"}
        assert client.get("/v1/models", headers=allowed).status_code == 200
        for path in ("/metrics", "/v1", "//v1/models", "/V1/models", "/nix"):
            assert client.get(path).status_code == 401
        files = {"image": ("a", photo)}
        assert client.post("/v1/models/a/segment", files=files).status_code == 401
        assert client.get("/healthz").status_code == 200
        assert client.get("/").status_code == 200
        paths = client.get("/openapi.json").json()["paths"]
        assert paths["/v1/models/{name}/segment"]["post"]["security"] == [{"HTTPBearer": []}]
        assert "security" not in paths["/healthz"]["get"]
    with TestClient(build_local_app(job), root_path="/street") as client:  # behind a prefix, as Serve mounts it
        assert client.get("/street/v1/models").status_code == 401
        assert client.get("/street/v1/models", headers=allowed).status_code == 200
        assert client.get("/street/healthz").status_code == 200


def test_images_on_s3(bundles: dict[Task, str], photo: bytes, s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/images/a.png", photo)
    storage.write_bytes(f"{s3_bucket}/secret/a.png", photo)
    job = job_of({"a": {"bundle": bundles["semantic"]}}, http={"fetch": [f"{s3_bucket}/images/"]})
    with TestClient(build_local_app(job)) as client:

        def ask(uri: str) -> Any:
            return client.post("/v1/models/a/segment", json={"uri": uri})

        assert (
            ask(f"{s3_bucket}/images/a.png").content
            == client.post("/v1/models/a/segment", files={"image": ("a", photo)}).content
        )
        paths = ("secret/a.png", "images/../secret/a.png", "images/x?/../../secret/a.png", "images/x#/../secret/a.png")
        odd = ("images/%2e%2e/secret/a.png", "images/..\\secret\\a.png", "images/a.png?", "images/\na.png")
        for uri in (*(f"{s3_bucket}/{path}" for path in (*paths, *odd)), "s3://other/a.png"):
            assert ask(uri).status_code == 403, uri
        missing = ask(f"{s3_bucket}/images/b.png")
        assert missing.status_code == 422
        assert "can't be had" in missing.json()["detail"]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, photo: bytes) -> Iterator[tuple[int, Path]]:
    """A server that speaks TLS on loopback, known as images.test; its port and its certificate."""
    folder = tmp_path_factory.mktemp("web")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "images.test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("images.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    app = FastAPI()
    app.add_api_route("/a.png", lambda: Response(photo, media_type="image/png"))
    app.add_api_route("/packed", lambda: Response(b"", headers={"Content-Encoding": "gzip, gzip"}))
    app.add_api_route("/large", lambda: Response(b"\0" * 2**20))
    app.add_api_route("/away", lambda: Response(status_code=302, headers={"Location": "https://169.254.169.254/"}))
    files = {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **files))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        pass
    yield server.servers[0].sockets[0].getsockname()[1], folder / "cert.pem"
    server.should_exit = True
    thread.join()


def test_images_on_the_web(
    bundles: dict[Task, str], photo: bytes, web: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, certificate = web
    look_up = asyncio.base_events.BaseEventLoop.getaddrinfo

    async def to_loopback(loop: Any, host: str, *arguments: Any, **named: Any) -> Any:
        return await look_up(loop, "127.0.0.1" if host == "images.test" else host, *arguments, **named)

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", to_loopback)
    monkeypatch.setattr("certifi.where", lambda: str(certificate))
    job = job_of({"a": {"bundle": bundles["semantic"]}}, http={"fetch": ["https://"], "max_bytes": 200_000})
    with TestClient(build_local_app(job)) as client:

        def ask(uri: str) -> Any:
            return client.post("/v1/models/a/segment", json={"uri": uri})

        for host in ("images.test", "127.0.0.1", "localhost", "[::1]", "169.254.169.254", "2130706433"):
            refused = ask(f"https://{host}:{port}/a.png")
            assert refused.status_code == 403, host
            assert "private address" in refused.json()["detail"]
        monkeypatch.setattr("raysseg.serve.fetch.is_public", lambda address: True)
        assert ask(f"https://images.test:{port}/a.png").status_code == 200  # by name in TLS, by address on the wire
        assert ask(f"https://images.test:{port}/large").status_code == 413
        assert "without redirection" in ask(f"https://images.test:{port}/away").json()["detail"]
        assert "content encoding" in ask(f"https://images.test:{port}/packed").json()["detail"]
        for uri in ("https://h:x/", "https://a..b/", f"https://{'a' * 64}.com/", "https://xn--/", "https://[v1.a]/"):
            assert ask(uri).status_code in (403, 422), uri
        assert ask(f"https://images.test:{port}/nix").status_code == 422
        monkeypatch.setattr("certifi.where", lambda: ssl.get_default_verify_paths().openssl_cafile)
        assert "ConnectError" in ask(f"https://images.test:{port}/a.png").json()["detail"]  # nobody vouches for it
        assert ask("http://images.test/a.png").status_code == 403


def test_pages_load_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/playground/app.js").status_code == 200
    assert client.get("/playground/../api.py").status_code == 404


def test_what_takes_too_long_is_given_up(
    bundles: dict[Task, str], photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = threading.Event()
    predict = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda *arguments: wait.wait(9) and predict(*arguments))
    wait.set()
    with TestClient(
        build_local_app(job_of({"a": {"bundle": bundles["semantic"]}}, http={"timeout": "1 second"}))
    ) as client:

        def ask() -> Any:
            return client.post("/v1/models/a/segment", files={"image": ("a", photo)})

        wait.clear()
        late = ask()
        assert late.status_code == 504
        assert "given up after 1 s" in late.json()["detail"]
        wait.set()
        assert ask().status_code == 200
        assert 'status="504"} 1.0' in client.get("/metrics").text


def test_counts(client: TestClient, photo: bytes) -> None:
    client.post("/v1/models/semantic/segment", files={"image": ("a", photo)})
    client.post("/v1/models/nix/segment", files={"image": ("a", photo)})
    text = client.get("/metrics").text
    assert 'raysseg_requests_total{action="segment",model="semantic",status="200"}' in text
    assert 'raysseg_requests_total{action="segment",model="unknown",status="404"}' in text
    assert 'raysseg_request_seconds_bucket{action="segment",le="0.5",model="semantic"}' in text


def test_the_interface_describes_itself(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/healthz",
        "/v1/models",
        *(f"/v1/models/{{name}}{part}" for part in ("", "/segment", "/images", "/prompt", "/everything")),
    }
    asked = paths["/v1/models/{name}/prompt"]["post"]
    assert asked["requestBody"]["content"]["application/json"]["example"]["points"] == [[120, 80], [30, 30]]
    assert asked["responses"]["422"]["content"]["application/problem+json"]["example"]["status"] == 422
    assert "security" not in asked  # as no token is asked for


# --- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_name_an_image_by_its_hash(client: TestClient, photo: bytes) -> None:
    image: Pixels = decode_image(photo)
    uploaded = client.post("/v1/models/sam/images", files={"image": ("a", photo)})
    assert uploaded.status_code == 201
    assert (uploaded.json()["height"], uploaded.json()["width"]) == image.shape[:2]
    key = uploaded.json()["image"]

    def ask(**keys: Any) -> Any:
        return client.post("/v1/models/sam/prompt", json={"image": key, **keys})

    found = ask(points=[[20, 30], [5, 5]], labels=[1, 0]).json()["masks"]
    assert len(found) == 3
    assert [mask["score"] for mask in found] == sorted((mask["score"] for mask in found), reverse=True)
    assert found[0]["area"] == to_mask(found[0]["segmentation"]).sum()
    assert len(ask(box=[5, 5, 60, 50], multimask=False).json()["masks"]) == 1
    assert len(ask(mask=found[0]["segmentation"], points=[[20, 30]]).json()["masks"]) == 3
    prompt = json.dumps({"points": [[20, 30], [5, 5]], "labels": [1, 0]})
    one_shot = client.post("/v1/models/sam/prompt", files={"image": ("a", photo)}, data={"prompt": prompt})
    assert one_shot.json()["masks"] == found
    assert client.post("/v1/models/sam/everything", json={"image": key}).status_code == 200
    for keys, status, reason in [
        ({}, 422, "has no points, no box and no mask"),
        ({"points": [[20, 30]], "labels": [1, 0]}, 422, "prompt.labels: 2 for 1 points"),
        ({"points": [[999, 30]]}, 422, "outside of the image"),
        ({"points": [[1]]}, 400, "length 2"),
        ({"points": "here"}, 400, "Expected `array`"),
        ({"box": [5, 5, 5, 5]}, 422, "no area"),
        ({"mask": {"size": [1, 1], "counts": "x"}}, 422, "prompt.mask"),
        ({"mask": {"counts": "PPPPPPPPPPPP4" * 3 + "0`nQPPPPPPPPPL"}}, 422, "prompt.mask"),
        ({"points": [[1, 1]] * 101}, 400, "length <= 100"),
        ({"image": "nix"}, 400, "64 hex digits"),
        ({"image": "0" * 64, "points": [[1, 1]]}, 404, "upload it again"),
    ]:
        answer = ask(**keys)
        assert answer.status_code == status, answer.text
        assert reason in answer.json()["detail"]


# --- moving on ----------------------------------------------------------------------------------------------------


def test_the_best_of_a_run_takes_over_and_what_is_broken_does_not(
    bundles: dict[Task, str], example: Path, tmp_path: Path, photo: bytes
) -> None:
    run = tmp_path / "run"
    write_bundle("semantic", example, str(run / "bundles/00000001"), seed=1)
    write_bundle("semantic", example, str(run / "bundles/00000002"), seed=2)
    shutil.copytree(run / "bundles/00000002", run / "bundles/00000003")
    (run / "bundles/00000003/model.safetensors").write_bytes(b"broken")

    def point_to(step: int) -> None:
        (run / "best.json").write_text(json.dumps({"bundle": f"bundles/{step:08d}", "step": step}))

    def versions_of(segmenter: Segmenter) -> Callable[[], Any]:
        async def ask() -> str:
            body = (await segmenter.segment(photo, "json")).body
            return str(json.loads(body)["version"])

        return ask

    async def check() -> None:
        point_to(1)
        served = job_of({"a": {"bundle": str(run), "follow": "1 second"}})
        model = served.models["a"]
        segmenter = Segmenter("a", model, served.s3)  # type: ignore[arg-type]
        await segmenter.reconfigure({"bundle": str(run)})
        ask = versions_of(segmenter)
        answers: list[str] = []
        is_over = asyncio.Event()

        async def load() -> None:
            while not is_over.is_set():
                answers.append(await ask())

        loads = [asyncio.create_task(load()) for _ in range(3)]
        first = await ask()
        point_to(2)
        await asyncio.sleep(2.5)
        second = await ask()
        assert second != first
        point_to(3)
        await asyncio.sleep(2.5)
        assert await ask() == second  # what is broken does not take over
        await segmenter.reconfigure({"bundle": str(run / "bundles/00000001")})
        assert await ask() == first  # and going back
        is_over.set()
        await asyncio.gather(*loads)
        assert set(answers) == {first, second}
        with pytest.raises(InputError):
            await segmenter.reconfigure({"bundle": str(run / "bundles/00000003")})
        assert await ask() == first
        await segmenter.check_health()

    asyncio.run(check())


def test_jobs_of_applications(tmp_path: Path) -> None:
    keys = {"name": "x", "models": {"a": {"bundle": "/b"}}}
    assert read_job(keys).name == "x"
    path = tmp_path / "serve.yaml"
    path.write_text("kind: serve\nname: x\nmodels: {a: {bundle: /b}}\n")
    assert read_job(str(path)) == read_job(keys)
    assert read_job({"job": str(path), "http.port": 9000}).http.port == 9000
    path.write_text("kind: inspect\nname: x\ndata: {format: masks, images: /i, masks: /m}\n")
    with pytest.raises(InputError, match="a serve job is needed"):
        read_job(str(path))
