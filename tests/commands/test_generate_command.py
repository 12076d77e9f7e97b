from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import randomize, reference_of

from tinygpt import GPT, Generator, GPTConfig, __version__, load_tokenizer
from tinygpt.commands import doctor
from tinygpt.commands.main import main
from tinygpt.runtime import device, memory
from tinygpt.tokenizer.encoding import char_tokenizer, decode, save_tokenizer

ROOT = Path(__file__).parents[2]
SHAPE = ["--layers", "1", "--heads", "1", "--dim", "16", "--context", "16"]
CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=16, vocab_size=257)  # nano with it
SHORT = [*SHAPE, "--max-new-tokens", "8", "--seed", "3"]


@pytest.fixture(autouse=True)
def _nowhere_to_fetch_from(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for name in ("TINYGPT_CACHE", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture
def cli(capsys):
    """Runs the program in this process: arguments -> (exit status, stdout, stderr)."""
    return lambda *argv: (main([str(word) for word in argv]), *capsys.readouterr())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, GPT]:
    folder = tmp_path_factory.mktemp("saved")
    (model := randomize(GPT(CONFIG))).save_pretrained(folder)
    save_tokenizer(load_tokenizer("bytes"), folder)
    return folder, model


@pytest.fixture
def endless(tmp_path) -> list[str]:
    """Arguments of a run that goes on: characters have no end token to be drawn."""
    save_tokenizer(char_tokenizer("Hi!"), tmp_path)
    return ["Hi", *SHAPE, "--tokenizer", str(tmp_path), "--max-new-tokens", "1000000"]


def start(*argv, program=("run.py",), env=None, stdout=subprocess.PIPE) -> subprocess.Popen:
    """The program in a process of its own; None in `env` takes a variable away."""
    env = {**os.environ, "PYTHONUNBUFFERED": None, **(env or {})}
    env = {name: value for name, value in env.items() if value is not None}
    command = [sys.executable, *program, *map(str, argv)]
    return subprocess.Popen(command, env=env, stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT)


def finish(process: subprocess.Popen) -> tuple[int, bytes, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err.decode()


def is_refused(run: tuple[int, str | bytes, str], words: str) -> bool:
    """Whether a run ended in one line that says why, with nothing on stdout."""
    status, out, err = run
    (line,) = err.splitlines()
    return status == 2 and not out and line.startswith("tinygpt: error: ") and words in line


def test_stdout_is_the_prompt_and_its_continuation_and_stderr_the_rest(cli):
    status, out, err = cli("Hi", *SHORT)
    assert status == 0
    assert re.fullmatch(r"Hi.+\n", out, re.DOTALL)
    assert re.fullmatch(
        rf"(tinygpt: no clang .+\n)?tinygpt: nano, {CONFIG.parameter_count:,} parameters on .+\n"
        r"tinygpt: untrained: .+ \(seed 3\), so the text is noise\n"
        r"tinygpt: 8 tokens, the first after \d+\.\d\d s, then [\d.]+ tokens/s\n",
        err,
    )


def test_a_seed_gives_the_same_text_again(cli):
    texts = [cli("Hi", *SHORT, "--seed", seed)[1] for seed in (3, 4, 3)]
    assert texts[0] == texts[2] != texts[1]


def test_each_sample_is_the_single_run_with_its_seed(cli, saved):
    argv = ["Hi", "--model", saved[0], "--max-new-tokens", 8, "--temperature", 1]
    first, second = (cli(*argv, "--seed", seed)[1] for seed in (3, 4))
    _, both, _ = cli(*argv, "--seed", 3, "--num-samples", 2)
    assert both == first.removesuffix("\n") + "\n---\n" + second


def test_json_holds_prompt_tokens_text_and_timings(cli):
    report = json.loads(cli("Hé", *SHORT, "--json", "--num-samples", 2)[1])
    samples, timings = report.pop("samples"), report.pop("timings")
    facts = {"model": None, "seed": 3, "device": device.describe()}
    assert report == {**facts, "prompt": "Hé", "prompt_tokens": list("Hé".encode())}
    assert len(samples) == 2
    for sample in samples:
        assert len(sample["tokens"]) == 8
        assert sample["text"] == decode(load_tokenizer("bytes"), sample["tokens"])
    assert 0 < timings["first_token_s"] < timings["total_s"]
    later_s = timings["total_s"] - timings["first_token_s"]
    assert timings["tokens_per_s"] == pytest.approx(14 / later_s)


def test_a_stop_text_ends_just_before_it(cli):
    _, whole, _ = cli("Hi", *SHORT)
    stop = next(c for c in whole[3:] if c.isascii() and c.isprintable())
    before = "Hi" + whole[2:].partition(stop)[0]
    assert cli("Hi", *SHORT, "--stop", "never there", "--stop", stop)[1] == before + "\n"
    (sample,) = json.loads(cli("Hi", *SHORT, "--stop", stop, "--json")[1])["samples"]
    assert sample["text"] == before[2:]
    assert sample["tokens"][-1] == ord(stop)


def test_special_tokens_are_text_unless_asked_for(cli):
    argv = ["<|endoftext|>", *SHORT, "--max-new-tokens", 0, "--json"]
    assert json.loads(cli(*argv)[1])["prompt_tokens"] == list(b"<|endoftext|>")
    assert json.loads(cli(*argv, "--special-tokens")[1])["prompt_tokens"] == [256]
    nothing = json.loads(cli(*argv[1:])[1])  # no prompt: what stands before a text in training
    assert (nothing["prompt"], nothing["prompt_tokens"]) == ("", [256])
    assert nothing["timings"]["first_token_s"] is None


@pytest.mark.parametrize(("given", "prompt"), [("Hé\n", "Hé"), ("a\n\n", "a\n"), ("a b", "a b")])
def test_stdin_is_the_prompt_less_one_newline(cli, monkeypatch, given, prompt):
    argv = [*SHORT, "--max-new-tokens", 0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert cli("-", *argv)[1] == f"{prompt}\n"
    read, write = os.pipe()
    os.write(write, given.encode())
    os.close(write)
    with open(read) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert cli(*argv)[1] == f"{prompt}\n"


@pytest.mark.parametrize("given", [b"a\xff", b"\n", b""], ids=repr)
def test_a_prompt_on_stdin_that_is_none_is_refused(cli, monkeypatch, given):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    words = "the prompt on stdin is not UTF-8" if b"a" in given else "the prompt is empty"
    assert is_refused(cli("-", *SHORT), words)


def test_a_prompt_past_the_window_works_and_says_what_is_read(cli):
    _, out, err = cli("0123456789" * 4, *SHORT, "--max-new-tokens", 2)
    assert re.fullmatch(r"(0123456789){4}.+\n", out, re.DOTALL)
    assert "the prompt has 40 tokens, the model's window 16: only its last 8 are read" in err


def test_control_characters_do_not_reach_a_terminal(cli, monkeypatch):
    argv = ["\t\x1b[31m\x9b", *SHORT, "--max-new-tokens", 0]
    assert cli(*argv)[1] == "\t\x1b[31m\x9b\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli(*argv)[1] == "\t\ufffd[31m\ufffd\n"
    assert "\x9b" not in cli(*argv, "--json")[1]


def test_every_shape_flag_reaches_the_model(cli, monkeypatch):
    flags = (
        "--preset mini --layers 2 --heads 2 --dim 8 --inner 12 --context 4 --vocab 300 --norm post "
        "--position sinusoidal --activation relu --no-bias --no-shortcut --untied"
    )
    config = GPTConfig(2, 2, 8, 4, 300, 12, "post", "sinusoidal", "relu", False, False, False)
    built = []
    monkeypatch.setattr(
        "tinygpt.commands.generate.GPT", lambda config, seed: built.append(config) or GPT(config)
    )
    status, _, err = cli("x", *flags.split(), "--max-new-tokens", 0)
    assert (status, built) == (0, [config])
    assert f"mini, {config.parameter_count:,} parameters" in err


def test_a_folder_is_continued_greedily_with_its_own_tokenizer(cli, saved):
    folder, model = saved
    _, out, err = cli("Hi", "--model", folder, "--max-new-tokens", 6, "--json")
    expected = list(Generator(model).generate(list(b"Hi"), 6, temperature=0))
    assert json.loads(out)["samples"][0]["tokens"] == expected
    assert json.loads(out)["model"] == str(folder)
    assert "untrained" not in err


DAMAGE = {
    "config.json: no such file": ("config.json", None),
    "config.json: its JSON is damaged": ("config.json", "{not JSON"),
    "none of model.safetensors": ("model.safetensors", None),
    "must be of kind": ("tinygpt_tokenizer.json", '{"kind": "other"}'),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_folder_that_is_not_whole_is_refused(cli, saved, tmp_path, words):
    name, content = DAMAGE[words]
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    (folder / name).unlink()
    if content:
        (folder / name).write_text(content)
    assert is_refused(cli("x", "--model", folder), words)


BAD = {
    "--modle gpt2": "did you mean --model?",
    "--temprature=0": "did you mean --temperature?",
    "several words": "unknown argument 'words': put a prompt of several words in quotes",
    "--layers two": "--layers: invalid int value: 'two'",
    "doctor --backend": "did you mean --backends?",
    "--model ./nowhere": "no folder or file './nowhere'",
    "--model run.py": "it is cut or no safetensors file",
    "--model gpt2": "cannot fetch config.json from http://127.0.0.1:1: connection refused",
    "--model gpt2 --layers 2": "--layers describes a new model, but --model brings its own",
    "--model gpt2 --preset nano": "--preset describes a new model",
    "--preset nanoo": "unknown preset 'nanoo': did you mean 'nano'?",
    "--heads 3": "--dim 128 is not divisible by --heads 3",
    "--layers 0": "--layers is 0: it must be a whole number, 1 or more",
    "--layers 999999999": "GB are free: choose a smaller model",
    f"--dim {'9' * 320}": "it must be a whole number, 1 or more, below 2**31",
    "--num-samples 1000000": "GB are free",
    "--norm prre": "unknown --norm 'prre': did you mean 'pre'?",
    "--dim 10000000 --heads 1": "GB are free: choose a smaller model",
    "--dtype int9": "unknown dtype 'int9': did you mean 'int8'?",
    "--tokenizer byte": "unknown tokenizer 'byte'",
    "--vocab 100": "ids up to 256, outside the model's vocabulary of 100",
    "--temperature -1": "temperature is -1.0: it must be 0 (greedy) or more",
    "--temperature nan": "temperature is nan",
    "--top-p 0": "top_p is 0.0: it must be above 0 and at most 1",
    "--num-samples 0": "--num-samples is 0",
    "--seed -1": "--seed is -1",
    "--stop ''": "--stop is empty",
    "''": "the prompt is empty",
    "a\udcff": "not valid Unicode",
}


@pytest.mark.parametrize("argv", BAD)
def test_bad_input_is_one_line_and_exit_status_2(cli, monkeypatch, argv):
    monkeypatch.chdir(ROOT)
    assert is_refused(cli(*shlex.split(argv)), BAD[argv])


def test_running_out_of_memory_is_one_line(cli, monkeypatch):
    monkeypatch.setattr("tinygpt.commands.generate.GPT", lambda *_: [0] * 2**62)
    assert is_refused(cli("x", *SHORT), "out of memory")


def test_run_py_and_the_module_and_the_command_are_one_program():
    runs = [start("--version"), start("--version", program=["-m", "tinygpt"])]
    assert [finish(run)[:2] for run in runs] == [(0, f"tinygpt {__version__}\n".encode())] * 2
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"tinygpt": f"{main.__module__}:{main.__name__}"}


def test_ctrl_c_keeps_what_was_made(endless):
    # the handler anew, because a shell's background job, as this may be, starts with it ignored
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tinygpt.commands.main import main; sys.exit(main())"
    )
    process = start(*endless, program=["-c", script])
    first = process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    status, rest, err = finish(process)
    assert status == 130
    assert re.fullmatch(rb"Hi.+\n", first + rest, re.DOTALL)
    assert "Traceback" not in err
    assert re.search(r"\d+ tokens, the first after", err)


def test_a_reader_that_leaves_ends_the_run_quietly(endless):
    process = start(*endless)
    process.stdout.read(4)
    process.stdout.close()
    process.stdout = None
    status, _, err = finish(process)
    assert status == 0
    assert all(line.startswith("tinygpt: ") for line in err.splitlines())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        status, _, err = finish(start("Hi", *SHORT, "--max-new-tokens", 0, stdout=full))
    assert is_refused((status, "", err.splitlines()[-1]), "no space left on device")


def test_closed_standard_streams_are_no_traceback():
    for command, expected in (("run.py --version >&-", 0), ("run.py - <&-", 2)):
        command = f"{shlex.quote(sys.executable)} {command}"
        run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == expected
        assert "Traceback" not in run.stderr


def test_a_backend_that_does_not_work_is_one_line(tmp_path):
    foo = start("x", *SHORT, env={"DEV": "FOO"})
    no_clang = start("x", *SHORT, env={"DEV": "CPU", "PATH": str(tmp_path), "CC": None})
    assert is_refused(finish(foo), "DEV=FOO does not work: tinygrad has no such backend. Unset DEV")
    assert is_refused(finish(no_clang), "DEV=CPU does not work: clang is not installed. Unset DEV")


def test_a_compiler_that_fails_is_one_line(tmp_path):
    empty = str(tmp_path / "kernels.db")  # no kernel of an earlier run
    failing = start("x", *SHORT, env={"DEV": "CPU", "CC": sys.executable, "CACHEDB": empty})
    status, out, err = finish(failing)
    assert out == b"x\n"
    assert is_refused((status, "", err.splitlines()[-1]), "status 1. Unset DEV")


def test_without_clang_another_compiler_is_taken_and_said(tmp_path):
    env = {"DEV": None, "PATH": str(tmp_path), "CC": None}
    status, out, err = finish(start("Hi", *SHORT, "--max-new-tokens", 2, env=env))
    assert status == 0, err
    assert out.startswith(b"Hi")
    if " on CPU " in err:  # else the machine has a GPU
        assert re.search(r"no clang found, so .* \(CPU:\w+\); clang makes faster kernels\n", err)


def test_the_doctor_shows_the_machine_and_what_it_lacks(cli, monkeypatch):
    monkeypatch.setattr(device, "find_clang", lambda: None)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 10**9)
    status, out, _ = cli("doctor")
    assert status == 0
    rows = "tinygpt with python cores memory DEV clang models kernels vocabulary device advice"
    assert {line[:13].strip() for line in out.splitlines()} == set(rows.split())
    assert f"tinygpt      {__version__}\n" in out
    assert re.search(r"^device +\w+: found, ", out, re.MULTILINE)
    assert "advice       install clang" in out
    assert "advice       free some memory" in out


@pytest.mark.slow
def test_the_doctor_finds_this_backend_right(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_targets", lambda _: [os.environ.get("DEV") or "CPU"])
    monkeypatch.chdir(tmp_path)
    status, out, _ = cli("doctor", "--backends")
    assert status == 0
    assert re.search(r"\nbackend +\S+: right, largest error of a logit \S+, \d+ tokens/s", out)


@pytest.mark.parametrize("stdout", ['{"error": 0.5, "tokens_per_s": 9}', ""])
def test_the_doctor_tells_a_backend_that_is_wrong_or_broken(cli, monkeypatch, stdout):
    result = subprocess.CompletedProcess([], 1, stdout, "a\nit broke\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    monkeypatch.setattr(doctor, "_targets", lambda _: ["CPU"])
    monkeypatch.setattr(doctor, "_clang", lambda: "")
    status, out, _ = cli("doctor", "--backends")
    assert status == 1
    assert ("CPU: WRONG" if stdout else "CPU: does not run here (it broke)") in out


@pytest.mark.backend
def test_the_doctors_numbers_are_the_references(capsys):
    expected = reference_of(doctor.toy())([doctor.PROMPT])[0, -1]
    np.testing.assert_allclose(doctor.LOGITS, expected, atol=1e-5)
    doctor.probe()
    assert json.loads(capsys.readouterr().out)["error"] < doctor.TOLERANCE
