"""Models fetched from a small server on this machine, which can misbehave in every way we know."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest

from tinygpt.checkpoints import download, hub
from tinygpt.checkpoints.load_tokenizer import load_tokenizer
from tinygpt.errors import CheckpointError, InputError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SINGLE = {CONFIG: b"{}", "vocab.json": b"{}", "model.safetensors": b"weights" * 1000}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDED = {
    CONFIG: b"{}",
    INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode(),
    SHARDS[0]: b"first",
    SHARDS[1]: b"second",
}


ADAPTER = {"adapter_config.json": b"{}", "vocab.json": b"{}", "adapter_model.bin": b"weights"}


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
        handler.close_connection = True
        if name in self.redirect and host == "127.0.0.1":
            handler.send_response(302)
            handler.send_header("Location", self.redirect[name])
            body = b""
        else:
            found = 200 if name in self.files.get(repo, {}) else 404
            handler.send_response(self.status.get(name, found))
        if name in self.stated and host == "127.0.0.1":
            handler.send_header("X-Linked-Etag", self.stated[name])
        if name in self.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            part = body[: self.chunked[name]]
            end = b"0\r\n\r\n" if part == body else b""
            handler.wfile.write(b"%x\r\n%s\r\n%s" % (len(part), part, end))
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
    names = (
        "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
        "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
    )  # fmt: skip
    server.files["org/chat"] = SINGLE | dict.fromkeys(names, b"{}") | {"README.md": b"no"}
    assert {*contents(hub.resolve("org/chat"))} == {*SINGLE, *names}


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
    if name == hub.BUILT_IN:
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
    files = {CONFIG: b"{}", "pytorch_model.bin": b"weights"}
    server.files["org/old"] = files
    assert contents(hub.resolve("org/old")) == files
    shards = {"pytorch_model-1.bin": b"first", "pytorch_model-2.bin": b"second"}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    files = {CONFIG: b"{}", "pytorch_model.bin.index.json": index, **shards}
    server.files["org/big"] = files
    assert contents(hub.resolve("org/big")) == files
    index = json.dumps({"weight_map": {"a": "../x.bin"}}).encode()
    server.files["org/bad"] = {CONFIG: b"{}", "pytorch_model.bin.index.json": index}
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
    server.files["org/old"] = {CONFIG: b"{}", "flax_model.msgpack": b""}
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
    server.files["org/bad"] = {CONFIG: b"{}", INDEX: index}
    fails("org/bad", "is not a plain .safetensors name", CheckpointError)
    assert models(tmp_path) == []
    assert server.asked()[-1] == INDEX


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b'{"weight_map":{}}', b'{"weight_map":[]}', b'{"a":' * 9**5, b"{\xff"],
    ids=range(7),
)
def test_an_index_must_be_what_it_says(index: bytes, server: Server, tmp_path: Path) -> None:
    server.files["org/bad"] = {CONFIG: b"{}", INDEX: index}
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
            download._Redirects().redirect_request(request, body, 302, "", Message(), url)
    assert body.closed
    allowed = download._Redirects().redirect_request(
        request, body, 302, "", Message(), "https://cdn.example/a"
    )
    assert allowed is not None


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
    server.files["org/lora"] = {"adapter_config.json": b"{}"}
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
    fails("org/tiny", f"model.safetensors has {1 << 40} MiB, but only .* free; TINYGPT_CACHE")
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
