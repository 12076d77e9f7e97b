"""Models fetched from a small server on this machine, which can misbehave in every way we know."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest

from tinygpt.checkpoints import download, hub, watched_http
from tinygpt.checkpoints.load_tokenizer import load_tokenizer
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.watched_http import Redirects
from tinygpt.errors import CheckpointError, InputError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


def safetensors(count: int) -> bytes:
    """A file of the form with so many numbers."""
    entry = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
    header = json.dumps({"a": entry}).encode()
    numbers = b"".join(number.to_bytes(4, "little") for number in range(count))
    return len(header).to_bytes(8, "little") + header + numbers


def torch_file(content: bytes = b"") -> bytes:
    """A state dict without tensors, as torch saves it, beside which something else lies."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
        archive.writestr("x/other", content)
    return out.getvalue()


GPT2, VOCAB = b'{"model_type": "gpt2"}', b'{"a": 0, "b": 1, "ab": 2}'
SINGLE = {CONFIG: GPT2, "vocab.json": VOCAB, "model.safetensors": safetensors(2000)}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDED = {
    CONFIG: GPT2,
    INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode(),
    SHARDS[0]: safetensors(1),
    SHARDS[1]: safetensors(2),
}


LORA = b'{"peft_type": "LORA", "r": 1}'
ADAPTER = {"adapter_config.json": LORA, "vocab.json": VOCAB, "adapter_model.bin": torch_file()}

# Each with the least that can be right.
SMALL = {
    CONFIG: b'{"n_embd": 8}',
    "vocab.json": VOCAB,
    "merges.txt": b"#version: 0.2\na b\n",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
    "added_tokens.json": b"{}",
    "special_tokens_map.json": b"{}",
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{% if a %}{% endif %}",
}


class Server:
    """A Hub of our own: `files` by repository and name, and what is to go wrong, by file name."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.status: dict[str, int] = {}  # answer with this instead
        self.redirect: dict[str, str] = {}  # send on to this address
        self.cut: dict[str, int] = {}  # announce the length, send only so many bytes, hang up
        self.chunked: dict[str, int] = {}  # announce no length; hang up after so many bytes
        self.claim: dict[str, int] = {}  # announce this length
        self.stated: dict[str, str] = {}  # state this SHA-256
        self.headers: dict[str, dict[str, str]] = {}  # send these too
        self.tags: dict[str, str] = {}  # the ETags of files that can be had in parts
        self.bare: set[str] = set()  # announce no length, hang up at the end
        self.ranges: list[tuple[str, str | None, str | None]] = []  # (name, Range, If-Range)
        self.seen: list[tuple[str, str, str | None]] = []  # (host, path, authorization)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        host, path = handler.headers["Host"].split(":")[0], handler.path
        self.seen.append((host, path, handler.headers["Authorization"]))
        repo, _, name = path.removeprefix("/").partition("/resolve/main/")
        body = self.files.get(repo, {}).get(name, b"")
        self.ranges.append((name, handler.headers["Range"], handler.headers["If-Range"]))
        handler.close_connection = True
        if name in self.redirect and host == "127.0.0.1":
            handler.send_response(302)
            handler.send_header("Location", self.redirect[name])
            body = b""
        else:
            found = 200 if name in self.files.get(repo, {}) else 404
            begin, tag = handler.headers["Range"], self.tags.get(name)
            if found == 200 and tag and begin and handler.headers["If-Range"] == tag:
                start, found = int(begin.removeprefix("bytes=").removesuffix("-")), 206
                end, whole = len(body) - 1, len(body)
                handler.send_response(206)
                handler.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
                body = body[start:]
            else:
                handler.send_response(self.status.get(name, found))
            if found != 404 and tag:
                handler.send_header("ETag", tag)
        if name in self.stated and host == "127.0.0.1":
            handler.send_header("X-Linked-Etag", self.stated[name])
        if name in self.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            part = body[: self.chunked[name]]
            end = b"0\r\n\r\n" if part == body else b""
            handler.wfile.write(b"%x\r\n%s\r\n%s" % (len(part), part, end))
            return
        for header, value in self.headers.get(name, {}).items():
            handler.send_header(header, value)
        if name in self.bare:
            handler.end_headers()
            handler.wfile.write(body[: self.cut.get(name, len(body))])
            return
        handler.send_header("Content-Length", str(self.claim.get(name, len(body))))
        handler.end_headers()
        handler.wfile.write(body[: self.cut.get(name, len(body))])

    def asked(self) -> list[str]:
        return [path.rpartition("/")[2] for _, path, _ in self.seen]

    def stop(self) -> None:
        if self.thread.is_alive():
            self.http.shutdown()
            self.thread.join()
            self.http.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The only Hub there is, and caches and a current folder that are empty."""
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    started = Server()
    monkeypatch.setenv("HF_ENDPOINT", started.url)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield started
    started.stop()


def models(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "models"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fails(name: str, match: str, kind: type[InputError] = InputError) -> None:
    with pytest.raises(kind, match=match) as caught:
        hub.resolve(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files", [SINGLE, ADAPTER], ids=["a model", "an adapter"])
def test_fetched_once_and_then_without_a_server(server: Server, tmp_path: Path, files) -> None:
    server.files["org/tiny"] = files
    folder = hub.resolve("org/tiny")
    assert folder == tmp_path / "cache" / "models" / "org--tiny"
    assert contents(folder) == files
    assert server.asked()[0] == CONFIG
    assert server.asked()[-1] == [*files][-1]
    count = len(server.seen)
    assert hub.resolve("org/tiny") == folder
    assert len(server.seen) == count
    server.stop()
    assert hub.resolve("org/tiny") == folder


def test_all_files_that_say_what_ids_mean_are_fetched(server: Server) -> None:
    server.files["org/chat"] = SMALL | SINGLE | {"README.md": b"no"}
    assert contents(hub.resolve("org/chat")) == SMALL | SINGLE


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "org/tiny", "shakespeare"])
def test_where_a_folder_has_a_models_name_it_is_said_which_was_taken(
    name: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    server.files["org/tiny"] = SINGLE
    hub.resolve("org/tiny")
    Path(name).mkdir(parents=True)
    found = hub.resolve(name)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if name in hub.BUILT_IN:
        assert found == Path(hub.__file__).parents[1] / name
        assert said == "tinygpt: shakespeare is the model in the package; ./shakespeare is not it\n"
    else:
        assert found == Path(name)
        assert said == f"tinygpt: {name} is the folder here, not the model that is called so\n"
    for quiet in (Path(name), f"./{name}"):
        assert hub.resolve(quiet) == Path(name)
    Path("my-run").mkdir()
    assert hub.resolve("my-run") == Path("my-run")  # which nobody takes for another's
    assert capsys.readouterr().err == ""


def test_where_a_folder_has_a_tokenizers_name_it_is_said_which_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bytes").mkdir()
    assert load_tokenizer("bytes").name == "bytes"
    said = capsys.readouterr().err
    assert said == "tinygpt: bytes is the tokenizer of that name; ./bytes is not it\n"


def test_a_model_in_shards(server: Server) -> None:
    server.files["org/big"] = SHARDED
    assert contents(hub.resolve("org/big")) == SHARDED
    assert server.asked().count(SHARDS[0]) == 1


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_the_four_published_names(name: str, server: Server) -> None:
    server.files[f"openai-community/{name}"] = SINGLE
    assert hub.resolve(name).name == f"openai-community--{name}"
    assert hub.resolve(f"openai-community/{name}") == hub.resolve(name)


def test_a_name_without_an_organisation(server: Server) -> None:
    server.files["distilgpt2"] = SINGLE
    assert hub.resolve("distilgpt2").name == "distilgpt2"


def test_a_body_of_unannounced_length(server: Server, tmp_path: Path) -> None:
    server.files["org/tiny"] = SINGLE
    server.chunked["model.safetensors"] = 10
    fails("org/tiny", "cannot fetch model.safetensors from .*: IncompleteRead")
    assert models(tmp_path) == []
    server.chunked["model.safetensors"] = 10**6
    assert contents(hub.resolve("org/tiny")) == SINGLE


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_stated_sum_is_checked(elsewhere: bool, server: Server, tmp_path: Path) -> None:
    """As the Hub states it, also where another host has the file."""
    name = "model.safetensors"
    server.files["org/tiny"] = SINGLE
    if elsewhere:
        path = f"org/tiny/resolve/main/{name}"
        server.redirect[name] = f"http://localhost:{server.port}/{path}"
    server.stated[name] = '"' + "0" * 64 + '"'
    fails("org/tiny", f"sent {name} with SHA-256 .*, where it states 0000")
    assert models(tmp_path) == []
    server.stated[name] = hashlib.sha256(SINGLE[name]).hexdigest()
    assert contents(hub.resolve("org/tiny")) == SINGLE


def test_a_model_of_torchs_files(server: Server) -> None:
    files = {CONFIG: GPT2, "pytorch_model.bin": torch_file()}
    server.files["org/old"] = files
    assert contents(hub.resolve("org/old")) == files
    shards = {"pytorch_model-1.bin": torch_file(), "pytorch_model-2.bin": torch_file(b"b")}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    files = {CONFIG: GPT2, "pytorch_model.bin.index.json": index, **shards}
    server.files["org/big"] = files
    assert contents(hub.resolve("org/big")) == files
    index = json.dumps({"weight_map": {"a": "../x.bin"}}).encode()
    server.files["org/bad"] = {CONFIG: GPT2, "pytorch_model.bin.index.json": index}
    fails("org/bad", "is not a plain .bin name", CheckpointError)


@pytest.mark.parametrize("name", [CONFIG, "vocab.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 1])
def test_a_download_cut_short_leaves_nothing(
    name: str, kept: int, server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = SINGLE
    server.cut[name] = kept
    fails("org/tiny", f"sent {kept} of {len(SINGLE[name])} bytes of {name}: try again")
    assert models(tmp_path) == []
    server.cut.clear()
    assert contents(hub.resolve("org/tiny")) == SINGLE


def test_a_missing_shard_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.files["org/big"] = {k: v for k, v in SHARDED.items() if k != SHARDS[1]}
    fails("org/big", f"has no {SHARDS[1]}, which its {INDEX} names", CheckpointError)
    assert models(tmp_path) == []


def test_what_the_hub_may_answer(server: Server, tmp_path: Path) -> None:
    fails("org/none", "no model 'org/none' with a config.json at http://127.0.0.1")
    server.files["org/old"] = {CONFIG: GPT2, "flax_model.msgpack": b""}
    fails("org/old", "org/old has no model.safetensors or pytorch_model.bin")
    for status in (401, 403):
        server.status[CONFIG] = status
        fails("org/old", rf"does not give out org/old \(HTTP {status}\).*HF_TOKEN")
    for status in (429, 500, 503):
        server.status[CONFIG] = status
        fails("org/old", f"answered HTTP {status} for org/old config.json")
    assert models(tmp_path) == []


NOT_SHARDS = ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "a\\b.safetensors"]
NOT_SHARDS += [
    "9" * 300 + ".safetensors",
    ".x.safetensors",
    "x.bin",
    "",
    "x.safetensors\n",
    "é.safetensors",
]


@pytest.mark.parametrize("shard", [*NOT_SHARDS, 1, None, ["x.safetensors"]])
def test_a_shard_must_be_a_plain_name(shard: Any, server: Server, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    server.files["org/bad"] = {CONFIG: GPT2, INDEX: index}
    fails("org/bad", "is not a plain .safetensors name", CheckpointError)
    assert models(tmp_path) == []
    assert server.asked()[-1] == INDEX


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b'{"weight_map":{}}', b'{"weight_map":[]}', b'{"a":' * 9**5, b"{\xff"],
    ids=range(7),
)
def test_an_index_must_be_what_it_says(index: bytes, server: Server, tmp_path: Path) -> None:
    server.files["org/bad"] = {CONFIG: GPT2, INDEX: index}
    fails("org/bad", INDEX, CheckpointError)
    assert models(tmp_path) == []


def test_small_files_must_be_small(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_TEXT_BYTES", 1 << 20)
    server.files["org/tiny"] = SINGLE | {"vocab.json": b" " * (3 << 20)}
    fails("org/tiny", "vocab.json is larger than 1 MiB")
    monkeypatch.undo()


def test_the_token_stays_with_the_endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    server.files["org/tiny"] = server.files["org/renamed"] = SINGLE
    server.redirect["model.safetensors"] = (
        f"http://localhost:{server.port}/org/tiny/resolve/main/model.safetensors"
    )
    assert contents(hub.resolve("org/tiny")) == SINGLE
    assert {host for host, _, _ in server.seen} == {"127.0.0.1", "localhost"}
    for host, _, authorization in server.seen:
        assert authorization == (None if host == "localhost" else "Bearer hf_secret")


def test_the_token_follows_a_renamed_model(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.redirect[CONFIG] = "/new/name"
    fails("org/old", "no model 'org/old'")
    assert server.seen[1] == ("127.0.0.1", "/new/name", "Bearer hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf secret\r\nX: y")
    with pytest.raises(InputError, match="HF_TOKEN") as caught:
        hub.resolve("org/old")
    assert "secret" not in str(caught.value)


def test_no_redirect_gives_up_encryption() -> None:
    request, body = Request("https://hub.example/a"), BytesIO()
    for url in ("http://hub.example/a", "ftp://hub.example/a"):
        with pytest.raises(InputError, match="redirects from https to"):
            Redirects().redirect_request(request, body, 302, "", Message(), url)
    assert body.closed
    allowed = Redirects().redirect_request(
        request, body, 302, "", Message(), "https://cdn.example/a"
    )
    assert allowed is not None


@pytest.mark.parametrize("url", ["file:///etc/passwd", "data:,{}", "DATA:\x1b[2J" + "x" * 9999])
def test_a_redirect_to_where_nothing_is_fetched_from_is_said(
    url: str, server: Server, tmp_path: Path
) -> None:
    server.redirect[CONFIG] = url
    place = f"127.0.0.1:{server.port}"
    fails(
        "org/x",
        f"^{place} redirects {CONFIG} to '{url[:5]}.*', where nothing is fetched from: try again",
    )
    with pytest.raises(InputError) as caught:
        hub.resolve("org/x")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert models(tmp_path) == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_in_a_circle_is_said(
    status: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = f"HTTP/1.1 {status} x\r\nLocation: /a\r\nContent-Length: 0\r\n\r\n".encode()
    raw = Raw(there)
    monkeypatch.setenv("HF_ENDPOINT", raw.url)
    try:
        fails("org/x", "^127.0.0.1:.* redirects .* to '/a', and so in a circle: try again later")
        with pytest.raises(InputError, match=r"redirects .* to '/a', and so in a circle"):
            download.fetch(f"{raw.url}/vocab.bpe", tmp_path / "vocab.bpe", "0" * 64)
    finally:
        raw.stop()
    assert models(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    ["file:///x", "http://" + "a" * 99, "http://a:b/", "/org/x/resolve/main/config.json"],
    ids=["a file", "no host name", "no port", "itself"],
)
def test_a_redirect_to_nonsense(url: str, server: Server, tmp_path: Path) -> None:
    server.redirect[CONFIG] = url
    fails("org/x", "config.json")
    assert models(tmp_path) == []


def test_without_a_network(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.stop()
    fails("gpt2", f"cannot fetch config.json from {server.url}: connection refused; .*--model")
    assert models(tmp_path) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails("gpt2", "openai-community/gpt2 is not in .*: unset HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for endpoint in (
        "ftp://x",
        "huggingface.co",
        "http://",
        "file:///",
        "https://a b",
        "http://[z",
    ):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        fails("gpt2", "HF_ENDPOINT is ")


def test_a_silent_server_is_not_waited_for_forever(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["org/tiny"] = SINGLE

    def read(*_: object) -> bytes:
        raise TimeoutError("timed out")

    monkeypatch.setattr(http.client.HTTPResponse, "read", read)
    fails("org/tiny", "cannot fetch config.json from .*: timed out")
    assert models(tmp_path) == []


def snapshot(tmp_path: Path, name: str, files: dict[str, bytes]) -> Path:
    """A model as the Hugging Face tools keep it."""
    folder = tmp_path / "hf" / f"models--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abcd", encoding="utf-8")
    (folder / "snapshots" / "0123abcd").mkdir(parents=True)
    for file, content in files.items():
        (folder / "snapshots" / "0123abcd" / file).write_bytes(content)
    return folder / "snapshots" / "0123abcd"


@pytest.mark.parametrize("files", [SINGLE, SHARDED, ADAPTER])
@pytest.mark.parametrize("kept_as", ["gpt2", "openai-community--gpt2"])
def test_a_hugging_face_cache_is_used(
    files: dict[str, bytes], kept_as: str, server: Server, tmp_path: Path
) -> None:
    kept = snapshot(tmp_path, kept_as, files)
    assert hub.resolve("gpt2") == kept
    assert server.seen == []
    assert not (tmp_path / "cache").exists()


def test_an_adapter_without_its_weights_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.files["org/lora"] = {"adapter_config.json": LORA}
    fails("org/lora", r"org/lora has no adapter_model.safetensors or adapter_model.bin")
    assert models(tmp_path) == []


def test_where_the_hugging_face_cache_may_be(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = snapshot(tmp_path, "org--x", SINGLE)
    monkeypatch.delenv("HF_HUB_CACHE")
    for variable, parent in (("HF_HOME", "home"), ("XDG_CACHE_HOME", "user/huggingface")):
        (tmp_path / parent).mkdir(parents=True)
        shutil.copytree(tmp_path / "hf", tmp_path / parent / "hub")
        monkeypatch.setenv(variable, str(tmp_path / parent.split("/")[0]))
        found = hub.resolve("org/x")
        assert found == tmp_path / parent / "hub" / kept.relative_to(tmp_path / "hf")
        monkeypatch.delenv(variable)


INCOMPLETE = [
    *((SHARDED, name) for name in (CONFIG, INDEX, *SHARDS)),
    *((ADAPTER, name) for name in ("adapter_config.json", "adapter_model.bin")),
]


@pytest.mark.parametrize(("files", "lacking"), INCOMPLETE, ids=[name for _, name in INCOMPLETE])
def test_an_incomplete_hugging_face_cache_is_not_used(
    files: dict[str, bytes], lacking: str, server: Server, tmp_path: Path
) -> None:
    (snapshot(tmp_path, "org--big", files) / lacking).unlink()
    server.files["org/big"] = files
    assert hub.resolve("org/big") == tmp_path / "cache" / "models" / "org--big"


def test_a_damaged_hugging_face_cache_is_not_used(server: Server, tmp_path: Path) -> None:
    kept = snapshot(tmp_path, "org--big", SHARDED)
    (kept / INDEX).write_bytes(b"{")
    server.files["org/big"] = SHARDED
    assert contents(hub.resolve("org/big")) == SHARDED
    # Another organisation's model of the same short name is another model.
    snapshot(tmp_path, "other", SINGLE)
    fails("openai-community/other", "no model")


def test_a_full_disk_is_noticed_before_writing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["org/tiny"] = SINGLE
    server.claim["model.safetensors"] = 1 << 60
    fails("org/tiny", f"model.safetensors has {1 << 40:,} MiB, but only .* free; TINYGPT_CACHE")
    assert models(tmp_path) == []


def test_a_disk_that_fills_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["org/tiny"] = SINGLE

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    fails("org/tiny", "cannot keep org/tiny in .*: no space left on device; TINYGPT_CACHE can")
    assert models(tmp_path) == []


def test_a_cache_that_cannot_be_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "file"))
    fails("gpt2", "cannot keep openai-community/gpt2 in .*; TINYGPT_CACHE can name another folder")
    assert server.seen == []


def test_an_interrupt_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["org/tiny"] = SINGLE

    def interrupt(*_: object) -> bytes:
        assert len(models(tmp_path)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(http.client.HTTPResponse, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve("org/tiny")
    assert models(tmp_path) == []


def test_another_process_may_be_faster(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["org/tiny"] = SINGLE
    target = tmp_path / "cache" / "models" / "org--tiny"
    real = os.rename

    def late(source: Path, destination: Path) -> None:
        shutil.copytree(source, destination)
        real(source, destination)

    monkeypatch.setattr(os, "rename", late)
    assert hub.resolve("org/tiny") == target
    assert contents(target) == SINGLE
    assert models(tmp_path) == ["org--tiny"]


def test_a_folder_is_itself(server: Server, tmp_path: Path) -> None:
    assert hub.resolve(tmp_path) == tmp_path
    (Path("gpt2")).mkdir()
    assert hub.resolve("gpt2") == Path("gpt2")
    assert hub.resolve("./gpt2") == Path("gpt2")
    assert server.seen == []


NOT_NAMES = ["", "/no/such", "./no", "../no", "~/no-such-folder", "~nobody/x", "a/b/c", "org/"]
NOT_NAMES += [".x", "a/.x", "a..b", "a--b", "-x", "a b", "a\\b", "a\nb", "a?b", "a#b", "a:b"]
NOT_NAMES += ["é", "a\0b", "\ud800", "a//b", "x" * 97, "x" * 9999, "https://huggingface.co/gpt2"]


@pytest.mark.parametrize("name", NOT_NAMES, ids=range(len(NOT_NAMES)))
def test_names_that_are_none(name: str, server: Server) -> None:
    with pytest.raises(InputError, match="give a model's folder or file") as caught:
        hub.resolve(name)
    assert "\n" not in str(caught.value)
    assert server.seen == []


def test_a_file_is_itself_and_anything_else_is_no_model(server: Server) -> None:
    Path("model.gguf").write_bytes(b"")
    assert hub.resolve("model.gguf") == Path("model.gguf")
    os.mkfifo("pipe")
    fails("./pipe", "'./pipe' is neither a folder nor a file")


def test_where_our_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGPT_CACHE", "~/mine")
    monkeypatch.setenv("HOME", "/home/someone")
    assert hub.cache_folder() == Path("/home/someone/mine")
    monkeypatch.delenv("TINYGPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert hub.cache_folder() == Path("/caches/tinygpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_folder() == Path("/home/someone/.cache/tinygpt")


PAGE = b"<!DOCTYPE html>\n<html><body>Log in</body></html>"
WEIGHTS = "model.safetensors"


def kept(tmp_path: Path) -> dict[str, int]:
    """The sizes of the files that a cut download has left."""
    folders = (tmp_path / "cache" / "models").glob(".*.part/model")
    return {path.name: path.stat().st_size for each in folders for path in each.iterdir()}


def recovers(server: Server, tmp_path: Path, files: dict[str, bytes]) -> None:
    """Nothing is left of what went wrong, and once the server is well the model comes."""
    assert models(tmp_path) == []
    for wrong in (server.status, server.cut, server.stated, server.headers, server.bare):
        wrong.clear()
    server.files["org/tiny"] = files
    assert contents(hub.resolve("org/tiny")) == files


TEXTS = {"merges.txt": b"#version: 0.2\na b\n", "chat_template.jinja": b"{{ a }}"}
ALL = SINGLE | TEXTS


@pytest.mark.parametrize("name", ALL)
def test_a_page_of_the_web_in_place_of_a_file_is_not_kept(
    name: str, server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = ALL | {name: PAGE}
    fails("org/tiny", f"sent {name} as a page of the web, .*login.*: try again", CheckpointError)
    recovers(server, tmp_path, ALL)


DAMAGED = {
    CONFIG: [b"", b"{", b"[]", gzip.compress(b"{}", mtime=0)],
    "vocab.json": [b'{"a": 1', b"\0\0"],
    "merges.txt": [b"", b"\xff\xfe"],
    WEIGHTS: [b"", SINGLE[WEIGHTS][:-1], SINGLE[WEIGHTS] + b"x", bytes(9000)],
}


@pytest.mark.parametrize(
    ("name", "body"), [(name, body) for name, bodies in DAMAGED.items() for body in bodies]
)
def test_a_damaged_file_is_not_kept(name: str, body: bytes, server: Server, tmp_path: Path) -> None:
    server.files["org/tiny"] = ALL | {name: body}
    fails("org/tiny", f"sent {name} damaged: .*not kept: try again", CheckpointError)
    recovers(server, tmp_path, ALL)


EXCUSES = [
    b'{"error": "login required"}',
    b'{"error": 401}',
    b'{"error": {"code": 401}, "status": 401, "path": "/x"}',
    b'{"message": "no", "documentation_url": "x"}',
    b'{"statusCode": 500, "message": "no"}',
]
WORDS = [b"Please log in to go on.\n", b"Forbidden", b"Not found", b"Access denied\n\n"]
AMISS = {
    CONFIG: [b"{}", b'{"a": 1}', b'{"model_type": null}', b'{"vocab_size": "many"}', *WORDS],
    "vocab.json": [b"{}", b'{"a": "b"}', b'{"a": 0, "b": null}', b'{"a": true}', b'{"a": 1.0}'],
    "added_tokens.json": [b'{"a": "b"}', b'{"a": [1]}'],
    "tokenizer.json": [b"{}", b'{"model": "x"}', b'{"version": "1.0"}'],
    "merges.txt": [b"a  b", b"a b\na\n", b" ab", b"ab ", b"a b\n \n", *EXCUSES],
    "tokenizer_config.json": [b"true"],
    "special_tokens_map.json": WORDS,
    "generation_config.json": [b'"no"'],
    "chat_template.jinja": [b"{}", *EXCUSES],
}


@pytest.mark.parametrize("name", SMALL)
def test_another_content_than_the_name_says_is_not_kept(
    name: str, server: Server, tmp_path: Path
) -> None:
    excuses = WORDS if name.endswith((".txt", ".jinja")) else EXCUSES
    for body in [*AMISS[name], *excuses]:
        server.files["org/tiny"] = SMALL | SINGLE | {name: body}
        fails("org/tiny", f"sent {name} damaged: .*not kept: try again", CheckpointError)
        recovers(server, tmp_path, SMALL | SINGLE)
        shutil.rmtree(tmp_path / "cache")


def test_another_content_than_an_adapters_is_not_kept(server: Server, tmp_path: Path) -> None:
    for body in [b"{}", *EXCUSES]:
        server.files["org/tiny"] = ADAPTER | {"adapter_config.json": body}
        fails("org/tiny", "sent adapter_config.json damaged: .*not kept", CheckpointError)
        recovers(server, tmp_path, ADAPTER)
        shutil.rmtree(tmp_path / "cache")


def test_what_a_file_holds_that_is_not_kept_is_shown_short_and_escaped(server: Server) -> None:
    body = json.dumps({"error": "\x1b[2J" * 9999}).encode()
    for name in (CONFIG, "merges.txt", "chat_template.jinja"):
        server.files["org/tiny"] = SINGLE | {name: body}
        with pytest.raises(CheckpointError, match="'") as caught:
            hub.resolve("org/tiny")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_unusual_content_that_can_be_right_is_kept(server: Server) -> None:
    unusual = {
        CONFIG: b'{"model_type": "tinygpt", "error": 1}',
        "merges.txt": "a b\r\n\u0120 #version\r\n".encode(),
        "added_tokens.json": b'{"url": 3, "type": 4}',
        "generation_config.json": b'{"error": "x", "eos_token_id": 2}',
    }
    server.files["org/tiny"] = SMALL | SINGLE | unusual
    assert contents(hub.resolve("org/tiny")) == SMALL | SINGLE | unusual


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_damaged_torch_file_is_not_kept(name: str, server: Server, tmp_path: Path) -> None:
    config = "adapter_config.json" if name[0] == "a" else CONFIG
    whole = {config: LORA if name[0] == "a" else GPT2, name: torch_file(b"x" * 1000)}
    server.files["org/tiny"] = whole | {name: whole[name][:-100]}
    fails("org/tiny", f"sent {name} damaged: .*not kept: try again", CheckpointError)
    recovers(server, tmp_path, whole)


@pytest.mark.parametrize("name", [*SINGLE, "merges.txt"])
def test_half_a_body_without_a_length_is_not_kept(
    name: str, server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = ALL
    server.bare.add(name)
    server.cut[name] = len(ALL[name]) // 2
    fails("org/tiny", f"{name}.*try again")
    recovers(server, tmp_path, ALL)


def test_a_body_without_a_length_is_taken_where_it_can_be_seen_to_be_whole(
    server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = SINGLE
    server.bare |= {*SINGLE}
    assert contents(hub.resolve("org/tiny")) == SINGLE


@pytest.mark.parametrize("status", [201, 202, 203, 204, 205, 206, 226, 299, 304, 305, 999])
@pytest.mark.parametrize("name", [CONFIG, "vocab.json", WEIGHTS])
def test_another_status_than_asked_for_is_refused(
    name: str, status: int, server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = SINGLE
    server.status[name] = status
    fails("org/tiny", f"answered HTTP {status} for org/tiny {name}.*: try again")
    recovers(server, tmp_path, SINGLE)


@pytest.mark.parametrize(
    ("header", "value"),
    [("Content-Encoding", "gzip"), ("Content-Encoding", "\x1b]0;x"), ("Transfer-Encoding", "gzip")],
)
@pytest.mark.parametrize("name", [CONFIG, "merges.txt", WEIGHTS])
def test_an_encoding_that_was_not_asked_for_is_refused(
    name: str, header: str, value: str, server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = ALL
    server.headers[name] = {header: value}
    fails("org/tiny", f"sent {name} in the encoding .*not asked for: try again")
    recovers(server, tmp_path, ALL)


def git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@pytest.mark.parametrize("form", ['"{}"', "{}", 'W/"{}"'])
@pytest.mark.parametrize("name", ["merges.txt", WEIGHTS])
def test_the_hash_in_an_etag_is_checked(
    name: str, form: str, server: Server, tmp_path: Path
) -> None:
    """SHA-256 of large files, git's of small ones; of other files the form could not tell."""
    changed = bytearray(ALL[name])
    changed[-2] ^= 1
    server.files["org/tiny"] = ALL | {name: bytes(changed)}
    for stated in (git_hash(ALL[name]), hashlib.sha256(ALL[name]).hexdigest()):
        server.headers[name] = {"ETag": form.format(stated)}
        fails("org/tiny", f"sent {name} with .*, where it states {stated}; .*try again")
        assert models(tmp_path) == []
    server.files["org/tiny"] = ALL
    assert contents(hub.resolve("org/tiny")) == ALL


def test_an_etag_that_is_no_hash_is_none(server: Server) -> None:
    server.files["org/tiny"] = SINGLE
    server.headers[WEIGHTS] = {"ETag": '"62a-5f1"'}
    assert contents(hub.resolve("org/tiny")) == SINGLE


def test_a_kept_model_that_is_damaged_says_how_to_fetch_it_again(
    server: Server, tmp_path: Path
) -> None:
    server.files["openai-community/gpt2"] = SINGLE
    folder = hub.resolve("gpt2")
    (folder / WEIGHTS).write_bytes(PAGE)
    with pytest.raises(CheckpointError, match="`tinygpt models --remove gpt2` removes it"):
        open_checkpoint("gpt2")
    hub.remove("gpt2")
    assert contents(hub.resolve("gpt2")) == SINGLE


def test_a_cut_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.files["org/big"] = SHARDED
    server.tags = {name: f'"{name}"' for name in SHARDED}
    server.cut[SHARDS[1]] = 20
    fails("org/big", f"sent 20 of {len(SHARDED[SHARDS[1]])} bytes of {SHARDS[1]}: try again")
    assert kept(tmp_path)[SHARDS[1]] == 20
    assert [model.name for model in hub.local_models()] == [*hub.BUILT_IN]
    server.cut.clear()
    server.ranges.clear()
    assert contents(hub.resolve("org/big")) == SHARDED
    assert (SHARDS[1], "bytes=19-", f'"{SHARDS[1]}"') in server.ranges
    whole = len(SHARDED[SHARDS[0]]) - 1  # which is asked for its last byte alone
    assert (SHARDS[0], f"bytes={whole}-", f'"{SHARDS[0]}"') in server.ranges
    assert models(tmp_path) == ["org--big"]


def test_a_cut_download_starts_anew_where_the_file_is_another_now(
    server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = SINGLE
    server.tags = {WEIGHTS: '"one"'}
    server.cut[WEIGHTS] = 100
    fails("org/tiny", "sent 100 of")
    server.cut.clear()
    server.tags = {WEIGHTS: '"two"'}
    other = SINGLE | {WEIGHTS: safetensors(100)}
    server.files["org/tiny"] = other
    assert contents(hub.resolve("org/tiny")) == other


@pytest.mark.parametrize("answer", ["no ranges", "416", "another part", "another state", "weak"])
def test_a_cut_download_starts_anew_where_the_server_gives_no_such_part(
    answer: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["org/tiny"] = SINGLE
    server.tags = {WEIGHTS: 'W/"one"' if answer == "weak" else '"one"'}
    server.cut[WEIGHTS] = 100
    fails("org/tiny", "sent 100 of")
    assert (WEIGHTS in kept(tmp_path)) == (answer != "weak")
    server.cut.clear()
    real = server.answer

    def answer_so(handler: BaseHTTPRequestHandler) -> None:
        if handler.headers["Range"] and answer != "weak":
            if answer == "416":
                handler.send_response(416)
            elif answer == "no ranges":
                del handler.headers["Range"]
                return real(handler)
            else:
                handler.send_response(206)
                start = 50 if answer == "another part" else 99
                whole = len(SINGLE[WEIGHTS])
                handler.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
                handler.send_header("ETag", '"two"' if answer == "another state" else '"one"')
            body = b"" if answer == "416" else bytes(whole - start)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            return None
        return real(handler)

    monkeypatch.setattr(server, "answer", answer_so)
    assert contents(hub.resolve("org/tiny")) == SINGLE


def test_what_was_cut_and_does_not_fit_its_end_is_thrown_away(
    server: Server, tmp_path: Path
) -> None:
    """The disk may have lost what was written last, or the server may have lied."""
    server.files["org/tiny"] = SINGLE
    server.tags = {WEIGHTS: '"one"'}
    server.stated[WEIGHTS] = hashlib.sha256(SINGLE[WEIGHTS]).hexdigest()
    server.cut[WEIGHTS] = 5000
    fails("org/tiny", "sent 5000 of")
    (path,) = (tmp_path / "cache" / "models").glob(f".*.part/model/{WEIGHTS}")
    path.write_bytes(bytes(5000))
    server.cut.clear()
    fails("org/tiny", "with SHA-256 .*, where it states .*try again")
    assert models(tmp_path) == []
    assert contents(hub.resolve("org/tiny")) == SINGLE


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "endless"])
@pytest.mark.parametrize("place", [f"{WEIGHTS}.etag", f"model/{WEIGHTS}", "model", "", "tmp"])
def test_what_is_no_plain_file_where_a_cut_download_was_is_not_waited_for(
    place: str, kind: str, server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = SINGLE
    server.tags = {name: f'"{name}"' for name in SINGLE}
    server.cut[WEIGHTS] = 100
    fails("org/tiny", "sent 100 of")
    server.cut.clear()
    (folder,) = (tmp_path / "cache" / "models").glob(".*.part")
    path = folder.with_name(".0123456789abcdef.tmp") if place == "tmp" else folder / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        (path / "inner").mkdir(parents=True)
    else:
        path.symlink_to("/dev/zero" if kind == "endless" else other)
    for _ in range(2):  # what stands in the way of a folder may cost one try
        with suppress(InputError):
            hub.resolve("org/tiny")
    assert contents(hub.resolve("org/tiny")) == SINGLE
    assert other.read_bytes() == b"mine"


def test_files_of_an_earlier_try_that_the_model_has_no_more_do_not_stay(
    server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = ALL
    server.tags = {name: f'"{name}"' for name in ALL}
    server.cut[WEIGHTS] = 100
    fails("org/tiny", "sent 100 of")
    server.cut.clear()
    server.files["org/tiny"] = SINGLE
    assert contents(hub.resolve("org/tiny")) == SINGLE


KILLED = """
import sys
from tinygpt.checkpoints import hub
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.watched_http import Response
real = Response.piece
def piece(self):
    data = real(self)
    print("here", flush=True)
    sys.stdin.readline()  # killed before there is one
    return data
Response.piece = piece
hub.resolve("org/tiny")
"""


def downloading() -> subprocess.Popen:
    """Another process, which is in the midst of a download."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"here\n"
    return process


def test_what_a_killed_download_left_is_swept_and_never_that_of_a_running_one(
    server: Server, tmp_path: Path
) -> None:
    server.files["org/tiny"] = SINGLE
    folder = tmp_path / "cache" / "models"
    running = downloading()
    killed = downloading()
    try:
        assert models(tmp_path) == [".org--tiny.0.part", ".org--tiny.1.part"]
        for path in (folder / ".org--tiny.0.part", *(folder / ".org--tiny.0.part").rglob("*")):
            os.utime(path, (0, 0))
        killed.kill()
        killed.wait()
        hub.remove("org/tiny")
        assert models(tmp_path) == [".org--tiny.0.part"]
        assert contents(hub.resolve("org/tiny")) == SINGLE
        assert models(tmp_path) == [".org--tiny.0.part", "org--tiny"]
    finally:
        running.kill()
        running.communicate()
        killed.communicate()
    server.files["org/other"] = SINGLE
    hub.resolve("org/other")
    assert models(tmp_path) == ["org--other", "org--tiny"]


def test_what_a_killed_download_of_another_model_left_is_swept_when_it_is_old(
    server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "models"
    for name in (".org--a.0.part", ".org--b.0.part", ".0123456789abcdef.tmp"):
        (folder / name / "model").mkdir(parents=True)
        (folder / name / "model" / CONFIG).write_bytes(b"{}")
    for path in folder.rglob("*"):
        if "--b" not in str(path):
            os.utime(path, (0, 0))
    server.files["org/tiny"] = SINGLE
    hub.resolve("org/tiny")
    assert models(tmp_path) == [".org--b.0.part", "org--tiny"]


class Raw:
    """A server that sends whatever bytes it is told to, one connection after the other."""

    def __init__(self, *parts: bytes, endless: bytes = b"", slowly: bool = False) -> None:
        self.parts, self.endless, self.slowly = parts, endless, slowly
        self.sent = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.stopped = threading.Event()
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                for part in self.parts:
                    self.send(connection, part)
                while self.endless and not self.stopped.is_set():
                    self.send(connection, self.endless)

    def send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        self.sent += len(data)
        if self.slowly:
            self.stopped.wait(0.02)

    def stop(self) -> None:
        self.stopped.set()
        self.listener.close()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
HOSTILE = {
    "negative chunk": ([CHUNKED, b"-5\r\nabc"], b""),
    "chunk of -1 and no end": ([CHUNKED, b"-1\r\n"], b"x" * 65536),
    "absurd chunk": ([CHUNKED, b"f" * 40 + b"\r\nabc"], b""),
    "chunk size of letters": ([CHUNKED, b"zz\r\nabc"], b""),
    "chunk size without end": ([CHUNKED], b"0" * 65536),
    "endless extension": ([CHUNKED, b"1;"], b"a" * 65536),
    "endless trailers": ([CHUNKED, b"2\r\n{}\r\n0\r\n"], b"a: b\r\n" * 9999),
    "endless headers": ([OK], b"a: b\r\n" * 9999),
    "endless header": ([OK, b"a: "], b"b" * 65536),
    "endless continue": ([], b"HTTP/1.1 100 Continue\r\n\r\n" * 999),
    "endless status": ([b"HTTP/1.1 200 "], b"x" * 65536),
    "endless body": ([OK + b"\r\n"], b" " * 65536),
    "endless small chunks": ([CHUNKED], b"1\r\n \r\n" * 9999),
    "negative length": ([OK + b"Content-Length: -5\r\n\r\n"], b""),
    "absurd length": ([OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}"], b""),
    "no HTTP": ([b"\x1b]0;owned\x07\x1b[2J" * 99 + b"\r\n"], b""),
    "escapes in its reason": ([b"HTTP/1.1 599 \x1b]0;owned\x07\x1b[2J\r\n\r\n"], b""),
    "escapes in a redirect": ([b"HTTP/1.1 302 x\r\nLocation: \x1b]0;owned\x07://x\r\n\r\n"], b""),
    "long redirect": ([b"HTTP/1.1 302 x\r\nLocation: q://" + b"x" * 60_000 + b"\r\n\r\n"], b""),
    "nothing": ([], b""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_answer_ends_in_one_line(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_TEXT_BYTES", 4 << 20)
    parts, endless = HOSTILE[kind]
    raw = Raw(*parts, endless=endless)
    monkeypatch.setenv("HF_ENDPOINT", raw.url)
    try:
        tracemalloc.start()
        with pytest.raises(InputError) as caught:
            hub.resolve("org/tiny")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
        raw.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1300
    assert raw.sent < 64 << 20
    assert models(tmp_path) == []


DRIPS = {
    "headers": ([OK], b"a"),
    "continues": ([], b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": ([OK + b"Content-Length: 99999999\r\n\r\n"], b" "),
    "body of no length": ([OK + b"\r\n"], b" "),
    "chunks": ([CHUNKED], b"1\r\n \r\n"),
    "trailers": ([CHUNKED, b"2\r\n{}\r\n0\r\n"], b"a"),
}


@pytest.mark.parametrize("kind", DRIPS)
def test_a_server_that_drips_meets_a_deadline(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_http, "_PIECE_S", 0.3)
    parts, endless = DRIPS[kind]
    raw = Raw(*parts, endless=endless, slowly=True)
    monkeypatch.setenv("HF_ENDPOINT", raw.url)
    try:
        fails("org/tiny", "the server is too slow")
    finally:
        raw.stop()
    assert models(tmp_path) == []


def test_a_file_that_the_disk_has_no_room_for_is_told_its_size_and_the_room(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["org/tiny"] = SINGLE
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    fails("org/tiny", "has 1 MiB, but only 0 MiB are free")
    assert models(tmp_path) == []


def test_a_file_without_a_length_meets_the_end_of_the_disk_before_it_is_full(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["org/tiny"] = SINGLE | {WEIGHTS: safetensors(100_000)}
    server.bare.add(WEIGHTS)
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    fails("org/tiny", "no more than 0 MiB are free")
    assert models(tmp_path) == []
