"""A name that is nowhere is told at once, whatever the hub does: refuse, keep silent, or say that it has none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from mtraining.errors import UserError
from mtraining.inputs import hub

SENTENCE_SECONDS = 45  # by far more than the question's deadline, and less than the retries took


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """As a user's machine is, but with an empty cache and no proxies."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "TIMEOUT", 1.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield listening.getsockname()[1]


@pytest.fixture
def empty_hub() -> Iterator[int]:
    """A hub that answers every question with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def refusal(name: str, kind: str = "model") -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        hub.find(name, f"model.init={name!r}", kind, "give a hub id")  # type: ignore[arg-type]
    assert time.monotonic() - started < SENTENCE_SECONDS
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["./typo", "/no/where", "~/typo", "a/b/c", "corpus.jsonl", "data/", "a\\b"])
def test_what_looks_like_a_path_never_reaches_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_ask", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "does not exist" in refusal(name)


def test_a_refusing_hub(online: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    online.setattr(constants, "ENDPOINT", url)
    for kind in ("model", "dataset"):
        assert f"is no path here, and the model hub ({url}) cannot be reached" in refusal("smoltok", kind)
    assert capfd.readouterr() == ("", "")


def test_a_silent_hub(online: pytest.MonkeyPatch, silent_port: int) -> None:
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent_port}")
    assert "cannot be reached" in refusal("smoltok")


def test_a_hub_without_it(online: pytest.MonkeyPatch, empty_hub: int) -> None:
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{empty_hub}")
    assert "has no model of that name" in refusal("owner/smoltok")
    assert "has no dataset of that name" in refusal("smoltok", "dataset")


def test_a_copy_in_the_cache_does_without_the_hub(online: pytest.MonkeyPatch, silent_port: int) -> None:
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent_port}")
    snapshot = Path(constants.HF_HUB_CACHE) / "models--owner--smoltok" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert hub.find("owner/smoltok", "model", "model", "") == {"local_files_only": True}
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.find("owner/smoltok", "model", "model", "") == {"local_files_only": True}
    assert "HF_HUB_OFFLINE keeps the model hub out of reach" in refusal("owner/other")


def test_what_is_here_is_taken_and_a_near_name_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.find("smollm", "model", "model", "") == {}
    assert "(did you mean 'smolm'?)" not in refusal("./smolm")
    assert "did you mean 'smollm'?" in refusal("./smolm")
