from __future__ import annotations

import builtins
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from conftest import save_with_bytes
from program import is_refused, start
from serving import model_to_serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    path = tmp_path_factory.mktemp("served") / "tiny"
    save_with_bytes(model_to_serve(4096), path)  # long texts, so that signals come amid them
    return path


@pytest.fixture
def program(folder):
    with listening(folder) as found:
        yield found


@contextmanager
def listening(folder: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """The program as it is started, and where it listens."""
    process = start("serve", folder, "--port", "0", "--slots", "1", "--queue", "4")
    lines = []
    while not lines or "listening" not in lines[-1]:
        lines.append(process.stderr.readline().decode())
        assert lines[-1], lines
    port = int(re.search(r"http://127.0.0.1:(\d+)", lines[-1])[1])
    with process:
        yield process, port
        process.kill()


@contextmanager
def asking(port: int, path: str, **body) -> Iterator[http.client.HTTPResponse]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        yield connection.getresponse()


def ask(port: int, path: str = "/v1/completions", **body) -> tuple[int, bytes]:
    with asking(port, path, **body) as answer:
        return answer.status, answer.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish_and_refuses_what_waits(program, number):
    process, port = program
    asked = {"prompt": "ab", "max_tokens": 4000, "stream": True, "temperature": 0}
    with asking(port, "/v1/completions", **asked) as running, ThreadPoolExecutor() as pool:
        running.readline()
        waiting = pool.submit(ask, port, prompt="c", max_tokens=9)
        while b"tinygpt_queue_length 1" not in (text := ask(port, "/metrics")[1]):
            assert b"tinygpt_slots_busy 1" in text, "the text had ended before"
        process.send_signal(number)
        while (status := ask(port, "/health"))[0] == 200:
            pass
        assert status[0] == 503  # a new client hears why, as long as something runs
        text = running.read()
        assert text.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in text
        status, answer = waiting.result()
    assert (status, json.loads(answer)["error"]["code"]) == (503, "draining")
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read().decode()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
def test_two_thousand_requests_leave_the_memory_and_the_sockets(program):
    process, port = program
    telling = threading.Thread(target=process.stderr.read, daemon=True)  # or its pipe is full
    telling.start()

    def some(count: int) -> tuple[int, int]:
        for number in range(count):
            asked = {"prompt": "abc" * (number % 9 + 1), "max_tokens": 3, "top_k": number % 5}
            ask(port, **asked, logprobs=number % 3, stream=number % 4 == 0)
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
        return memory, len(os.listdir(f"/proc/{process.pid}/fd"))

    before, after = some(300), some(2000)
    assert after[0] < before[0] * 1.02
    assert after[1] <= before[1] + 2
    process.terminate()
    telling.join()


def test_what_is_printed_has_no_prompts(program):
    process, port = program
    ask(port, prompt="Open Sesame", max_tokens=2)
    ask(port, prompt="Open Sesame", max_tokens=2, suffix="x")
    process.terminate()
    process.wait(60)
    told = process.stderr.read().decode()
    assert "POST /v1/completions 200" in told
    assert "Sesame" not in told
    assert process.stdout.read() == b""


def test_the_models_card_names_its_file_as_it_was_typed(program, folder):
    status, about = ask(program[1], "/study/model")
    assert (status, json.loads(about)["file"]) == (200, str(folder))


def test_a_name_that_is_no_text_is_spelled(folder, tmp_path):
    odd = tmp_path / os.fsdecode(b"m\xff")
    try:
        shutil.copytree(folder, odd)
    except OSError:
        pytest.skip("such a name cannot be had here")
    with listening(odd) as (_, port):
        status, models = ask(port, "/v1/models")
        assert (status, json.loads(models)["data"][0]["id"]) == (200, "m\\xff")
        status, about = ask(port, "/study/model")
        assert (status, json.loads(about)["file"]) == (200, f"{tmp_path}/m\\xff")
        asked = {"model": "m\\xff", "prompt": "a", "max_tokens": 1}
        assert ask(port, **asked)[0] == 200


def test_a_port_that_is_taken_is_told(cli):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = cli("serve", "--port", port)
    assert is_refused(refused, f"cannot listen on 127.0.0.1, port {port}: address already in use")
    assert is_refused(cli("serve", "--host", "no.such.host.invalid"), "--host no.such.host.invalid")
    assert is_refused(cli("serve", "--host", "192.0.2.1"), "cannot assign requested address")
    for name in ("..a", "a" * 300, "x." + "a" * 64, "\udcff"):
        assert is_refused(cli("serve", "--host", name), "no machine has such a name")


def test_bad_flags_are_told(cli):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    for argument, words in (
        (("--port", "70000"), "--port is 70000"),
        (("--slots", "0"), "--slots is 0"),
        (("--queue", "-1"), "--queue is -1"),
        (("--timeout", "0"), "--timeout is 0"),
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (("--cors", ""), "--cors is empty"),
        (("--slot", "1"), "did you mean --slots?"),
        (("--cors", "https://x.example/"), "without a path"),
        (("--cors", "*"), "one origin"),
        (("--api-key", "\u043a\u043b\u044e\u0447"), "no client could send it"),
    ):
        assert is_refused(cli("serve", *argument), words)


def test_what_is_missing_is_named(cli, monkeypatch):
    usual = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] in ("uvicorn", "starlette"):
            raise ImportError(name)
        return usual(name, *rest)

    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("uvicorn", "starlette")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert is_refused(cli("serve"), "pip install 'tinygpt[serve]'")


def ended(process, number: int) -> str:
    """What a program has said that a second signal has ended."""
    told = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 128 + number
    assert "Traceback" not in told
    assert "Exception" not in told
    return told


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
@pytest.mark.parametrize("stream", [True, False])
def test_a_second_signal_ends_at_once_what_still_runs(program, stream):
    process, port = program
    asked = {"prompt": "ab", "max_tokens": 4000, "stream": stream, "temperature": 0}
    body = json.dumps(asked).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        while b"tinygpt_slots_busy 1" not in ask(port, "/metrics")[1]:
            pass
        process.send_signal(signal.SIGINT)
        while ask(port, "/health")[0] == 200:
            pass
        for _ in range(3):
            process.send_signal(signal.SIGINT)
        ended(process, signal.SIGINT)
        answer = b""
        with suppress(ConnectionResetError):
            while part := client.recv(1 << 16):
                answer += part
    assert b"Internal Server Error" not in answer
    assert b"[DONE]" not in answer
    assert (b"HTTP/1.1 200" in answer) == stream


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no terminals that close")
def test_a_terminal_that_closes_tells_so_twice_and_what_runs_finishes(program):
    process, port = program
    asked = {"prompt": "ab", "max_tokens": 2000, "stream": True, "temperature": 0}
    with asking(port, "/v1/completions", **asked) as running:
        running.readline()
        process.send_signal(signal.SIGHUP)
        while ask(port, "/health")[0] == 200:
            pass
        process.send_signal(signal.SIGHUP)
        assert running.read().endswith(b"data: [DONE]\n\n")
    assert process.wait(60) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_the_compilation_ends_at_once(folder, number):
    """Whatever the threads do that compile, for which Python waits at its exit."""
    endless = (
        "import sys, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from tinygpt.__main__ import main\n"
        "from tinygpt.slots import Slots\n"
        "def compile(slots):\n"
        "    with ThreadPoolExecutor(1) as pool:\n"
        "        pool.submit(print, 'there', file=sys.stderr, flush=True)\n"
        "        pool.submit(threading.Event().wait)\n"
        "Slots.compile = compile\n"
        "sys.exit(main())"
    )
    process = start("serve", folder, "--port", "0", program=("-c", endless))
    assert b"compiling" in process.stderr.readline()
    assert process.stderr.readline() == b"there\n"
    with process:
        try:
            for _ in range(3):
                process.send_signal(number)
            assert not ended(process, number)
        finally:
            process.kill()
