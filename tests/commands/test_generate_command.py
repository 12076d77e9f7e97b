"""The command `generate`, which a prompt alone is too: its output, its flags, its refusals."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_clang, randomize, save_with_bytes
from program import CONFIG, ROOT, SHORT, finish, is_refused, start

from tinygpt import GPT, Generator, GPTConfig, load_tokenizer
from tinygpt.checkpoints import hub
from tinygpt.commands import prompt as read_from
from tinygpt.commands.output import Sample
from tinygpt.commands.prompt import stop_text
from tinygpt.runtime import device

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, GPT]:
    folder = tmp_path_factory.mktemp("saved")
    save_with_bytes(model := randomize(GPT(CONFIG)), folder)
    return folder, model


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


@pytest.mark.usefixtures("kernels_of_a_user")
def test_a_text_ends_with_a_whole_sentence_when_it_is_asked_to(cli):
    """Of the built-in model, which knows sentences: the first end past the length."""
    argv = ["First Citizen:", "--model", "shakespeare", "--seed", 4]
    whole = cli(*argv, "--max-new-tokens", 400)[1]
    for after in (0, 40, 90):
        found = cli(*argv, "--max-new-tokens", 400, "--sentence-after", after)[1]
        text = found.removesuffix("\n")
        assert whole.startswith(text)
        assert re.search(r"[.!?][\"')]*$", text)
        assert len(text) >= len("First Citizen:") + after
        assert len(text) < len(whole) - 100
    argv += ["--max-new-tokens", 900]
    samples = json.loads(cli(*argv, "--sentence-after", 40, "--num-samples", 2, "--json")[1])
    assert all(re.search(r"[.!?][\"')]*$", each["text"]) for each in samples["samples"])
    assert "--sentence-after is -1" in cli(*argv, "--sentence-after", -1)[2]


@pytest.mark.usefixtures("kernels_of_a_user")
def test_a_models_files_say_where_a_text_ends_unless_its_length_is_asked_for(cli, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(hub.resolve("shakespeare"), folder)
    path = folder / "generation_config.json"
    says = json.loads(path.read_text(encoding="utf-8")) | {"sentence_after": 30}
    path.write_text(json.dumps(says), encoding="utf-8")
    argv = ["First Citizen:", "--model", folder, "--seed", 4]
    by_files = cli(*argv)[1]
    assert by_files == cli(*argv, "--sentence-after", 30, "-n", 300)[1]
    assert by_files != (later := cli(*argv, "--sentence-after", 90)[1])
    assert later == cli(*argv, "--sentence-after", 90, "-n", 300)[1]
    assert len(cli(*argv, "-n", 250)[1]) == len("First Citizen:") + 250 + 1


def test_a_new_model_writes_at_temperature_1_if_nothing_is_said(cli):
    argv = ["Hi", *SHORT, "--num-samples", 40]  # it knows so little that few choices differ
    said = [cli(*argv, "--temperature", temperature)[1] for temperature in (1, 2)]
    assert cli(*argv)[1] == said[0] != said[1]


def test_letters_that_stdout_cannot_write_are_question_marks(cli, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli("Hé", *SHORT)[0] == 0
    stdout.flush()
    assert stdout.buffer.getvalue().startswith(b"H?")


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
        assert sample["text"] == load_tokenizer("bytes").decode(sample["tokens"])
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
    _, out, _ = cli("Hi", *SHORT, "--stop", stop, "--json", "--num-samples", 3)
    samples = json.loads(out)["samples"]  # one goes on where another has ended
    assert samples[0] == sample
    assert len(samples[1]["tokens"]) > len(sample["tokens"])


@needs_clang  # tinygrad's assembler without optimisations makes code that crashes
def test_an_escape_in_a_stop_text_is_its_character(cli):
    for given, text in (
        (r"\n", "\n"), (r"a\tb\r", "a\tb\r"), (r"\\n", r"\n"), (r"\u00e9", "é"), ("\\d\\", "\\d\\"),
        (r"\ud83d\ude00", "😀"), (r"\u12", r"\u12"), ("plain", "plain"),
    ):  # fmt: skip
        assert stop_text(given) == text
    assert is_refused(cli("Hi", *SHORT, "--stop", r"\ud83d"), "half of a surrogate pair")
    argv = ["ROMEO:\nI", "--seed", 2, "-n", 200, "--temperature", 0]
    assert cli(*argv, "--stop", r"\n")[1].count("\n") == 2


def test_a_prompt_file_is_the_prompt_without_its_mark_and_last_line_end(cli, tmp_path):
    file = tmp_path / "prompt.txt"
    argv = [*SHORT, "--max-new-tokens", 0, "--prompt-file", file]
    for content, text in (
        ("Hé\n", "Hé"), ("\ufeffHi", "Hi"), ("a\r\nb\r\n", "a\nb"), ("a\n\n", "a\n"),
    ):  # fmt: skip
        file.write_bytes(content.encode())
        assert cli(*argv)[1] == f"{text}\n"
    assert is_refused(cli("Hi", *argv), "--prompt-file and a prompt or --ids are two texts")
    file.write_bytes(b"\xef\xbb\xbf\n")
    assert is_refused(cli(*argv), "the prompt is empty")
    file.write_bytes(b"\xff")
    assert is_refused(cli(*argv), str(file))
    assert is_refused(cli(*argv[:-1], tmp_path / "none"), "no such file")


def test_short_flags_and_the_names_of_other_programs_mean_the_same(cli, saved):
    long = ["--model", saved[0], "--max-new-tokens", 5, "--temperature", 0.9, "--seed", 3]
    expected = cli("Hi", *long, "--top-k", 9)[1]
    assert cli("Hi", "-m", saved[0], "-n", 5, "-t", 0.9, "-s", 3, "--top_k", 9)[1] == expected
    other = ["--max_tokens", 5, "--temp", 0.9, "--seed=3", "--top_k=9"]
    assert cli("Hi", "-m", saved[0], *other)[1] == expected


def test_lines_from_a_pipe_are_continued_one_by_one(saved):
    argv = ["-i", "-m", saved[0], "-n", 6, "-t", 0]
    process = start(*argv, stdin=subprocess.PIPE)
    out, err = process.communicate("Hi\n\n\ufeffYou\r\n".encode(), timeout=300)
    assert process.returncode == 0, err
    texts = []
    for prompt in ("Hi", "You"):
        ids = Generator(saved[1]).generate(list(prompt.encode()), 6, 0, [256], temperature=0)
        texts.append(prompt + load_tokenizer("bytes").decode(ids) + "\n")
    assert out.decode() == "".join(texts)


def test_each_line_from_a_pipe_has_the_next_seeds(cli, saved):
    argv = ["-m", saved[0], "-n", 6, "-t", 1, "--num-samples", 2]
    process = start("-i", "--seed", 3, *argv, stdin=subprocess.PIPE)
    out, err = process.communicate(b"Hi\nYou\n", timeout=300)
    assert process.returncode == 0, err
    first, second = cli("Hi", *argv, "-s", 5)[1], cli("You", *argv, "-s", 7)[1]
    assert out.decode(errors="replace") == first + second


def test_a_line_from_a_pipe_that_is_not_utf8_is_told_and_the_next_continued(saved):
    process = start("-i", "-m", saved[0], "-n", 0, stdin=subprocess.PIPE)
    out, err = process.communicate(b"Hi\n\xff\nYou\n", timeout=300)
    assert (process.returncode, out) == (0, b"Hi\nYou\n")
    assert err.decode().count("error: the prompt on stdin is not UTF-8: invalid start byte") == 1


def test_ctrl_c_stops_a_typed_text_and_not_the_program(endless):
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tinygpt.commands.main import main; sys.exit(main())"
    )
    process = start("-i", *endless[1:], program=["-c", script], stdin=subprocess.PIPE)
    out = process.stdout.fileno()
    for _ in range(2):
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        shown = 0
        while shown < 9:  # some of its text
            shown += len(more := os.read(out, 65536))
            assert more
        process.send_signal(signal.SIGINT)
        assert any(b"the first after" in line for line in process.stderr)
        while select.select([out], [], [], 0)[0]:  # the rest of it, before the next begins
            assert os.read(out, 65536)
    process.stdin.close()
    process.stdin = None
    status, _, err = finish(process)
    assert (status, err) == (0, "")


@pytest.mark.parametrize("first", [["Hi"], ["--ids", "72,105"], []])
def test_interactive_continues_what_is_given_and_then_each_line(first, saved, cli, monkeypatch):
    argv = ["--model", saved[0], "-n", 4, "--temperature", 0]
    texts = [cli(*each, *argv)[1] for each in (first, ["Yo"], ["Oh"]) if each]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Yo\n\nOh\n")))
    status, out, _ = cli(*first, *argv, "--interactive")
    assert (status, out) == (0, "".join(texts))


def test_interactive_without_stdin_or_with_a_reader_that_leaves_ends_quietly(saved):
    line = f"{shlex.quote(sys.executable)} run.py -i -m {saved[0]} -n 3"
    for command in (f"{line} <&-", f"yes Hi | {line} | head -c 4", f"echo Hi | {line} >&-"):
        run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True)
        assert run.returncode == 0, run.stderr
        assert b"Traceback" not in run.stderr


def test_special_tokens_are_text_if_asked_for(cli):
    argv = ["<|endoftext|>", *SHORT, "--max-new-tokens", 0, "--json"]
    assert json.loads(cli(*argv)[1])["prompt_tokens"] == [256]
    ids = json.loads(cli(*argv, "--no-special-tokens")[1])["prompt_tokens"]
    assert ids == list(b"<|endoftext|>")
    nothing = json.loads(cli(*argv[1:])[1])  # no prompt: what stands before a text in training
    assert (nothing["prompt"], nothing["prompt_tokens"]) == ("", [256])
    assert nothing["timings"]["first_token_s"] is None


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("Hé\n", "Hé"),
        ("a\n\n", "a\n"),
        ("a b", "a b"),
        ("\ufeffHé\r\nb\r\n", "Hé\nb"),  # as Windows has it
    ],
)
def test_stdin_is_the_prompt_less_one_newline(cli, monkeypatch, given, prompt):
    argv = [*SHORT, "--max-new-tokens", 0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert cli("-", *argv)[1] == f"{prompt}\n"
    read, write = os.pipe()
    os.write(write, given.encode())
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
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
    assert "only its last" not in cli("0123456789abcdef", *SHORT, "--max-new-tokens", 2)[2]
    _, _, err = cli("Hi", *SHORT, "--context", 1, "--max-new-tokens", 2)
    assert "the prompt has 2 tokens, the model's window 1: only its last 1 are read" in err


def test_a_line_that_ends_as_on_windows_ends_at_a_terminal(cli, monkeypatch):
    """However its two characters come, and a carriage return by itself does not go back."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    pieces = ["a\r\nb", "\r", "\n", "c\r", "d", "\r"]
    monkeypatch.setattr(Sample, "add", lambda *_: pieces.pop(0) if pieces else "")
    assert cli("x", *SHORT)[1].endswith("a\nb\nc\ufffdd\n")


def test_control_characters_do_not_reach_a_terminal(cli, monkeypatch):
    argv = ["\t\x1b[31m\x9b", *SHORT, "--max-new-tokens", 0]
    assert cli(*argv)[1] == "\t\x1b[31m\x9b\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli(*argv)[1] == "\t\ufffd[31m\ufffd\n"
    assert "\x9b" not in cli(*argv, "--json")[1]


@pytest.mark.parametrize(
    "flags",
    [
        "--layers 2 --heads 2 --dim 8 --inner 12 --context 4 --vocab 300 --untied",
        "--n-layer 2 --n-head 2 --n-embd 8 --n-inner 12 --block-size 4 --vocab-size 300 "
        "--no-tie-word-embeddings",
    ],
    ids=["short", "by the field's name"],
)
def test_every_shape_flag_reaches_the_model(cli, monkeypatch, flags):
    flags += " --preset mini --norm post --position sinusoidal --activation relu"
    flags += " --no-bias --no-shortcut"
    config = GPTConfig(2, 2, 8, 4, 300, 12, "post", "sinusoidal", "relu", False, False, False)
    built = []
    monkeypatch.setattr(
        "tinygpt.writer.GPT", lambda config, seed: built.append(config) or GPT(config)
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
        (folder / name).write_text(content, encoding="utf-8")
    assert is_refused(cli("x", "--model", folder), words)


BAD = {
    "--modle gpt2": "did you mean --model?",
    "--temprature=0": "did you mean --temperature?",
    "--temper 0": "did you mean --temperature?",
    "--lrr 1": "unknown argument '--lrr' (`tinygpt --help`",
    "--device cuda": "the environment variable DEV chooses the device",
    "--top_p=much": "--top_p is 'much': it must be a number",
    "--layers two": "--layers is 'two': it must be a whole number, 1 or more and below 2**31",
    "--n-layer two": "--n-layer is 'two': it must be a whole number, 1 or more",
    "--top-p much": "--top-p is 'much': it must be a number, above 0 and at most 1",
    "doctor --backend": "did you mean --backends?",
    "--model ./nowhere": "no folder or file './nowhere'",
    "--model run.py": "it is a text: give a model's folder or file",
    "--model gpt2": "cannot fetch config.json from http://127.0.0.1:1: connection refused",
    "--model gpt2 --layers 2": "--layers describes a new model, but --model brings its own",
    "--model gpt2 --n-layer 2": "--n-layer describes a new model",
    "--model gpt2 --norm deep": "--norm describes a new model",
    "--model gpt2 --untied": "--untied describes a new model",
    "--model gpt2 --preset nano": "--preset describes a new model",
    "--preset nanoo": "unknown preset 'nanoo': did you mean 'nano'?",
    "--heads 3": "--n-embd 128 is not divisible by --heads 3",
    "--dim 30 --n-head 4": "--dim 30 is not divisible by --n-head 4",
    "--n-embd 5 --heads 1 --position sinusoidal": "--n-embd is 5: sinusoidal positions need an",
    "--layers 0": "--layers is 0: it must be a whole number, 1 or more",
    "--layers 999999999": "MiB are free: choose a smaller model",
    f"--dim {'9' * 320}": "it must be a whole number, 1 or more and below 2**31",
    "--num-samples 1000000": "MiB are free",
    "--num-samples 2147483647": "MiB are free",  # not even a list of their seeds is made
    "--layers 1 --heads 1 --dim 1 --context 1 --num-samples 2147483647": "MiB are free",
    "--num-samples 9999999999999999999999": "it must be a whole number, 1 or more and below 2**31",
    "--norm prre": "unknown --norm 'prre': did you mean 'pre'?",
    "--dim 10000000 --heads 1": "MiB are free: choose a smaller model",
    "--dtype flaot32": "unknown --dtype 'flaot32': did you mean 'float32'?",
    "--dtype int4": "unknown --dtype 'int4': allowed are float32, ",
    "--tok gpt2": "unknown argument '--tok': did you mean --tokenizer?",
    "--json=1": "--json takes no value",
    "--untrained=yes": "--untrained takes no value",
    "--version=1": "--version takes no value",
    "models remove": "unknown argument 'remove' (`tinygpt models --help`",
    "'To be' ''": "unknown argument '': put a prompt of several words in quotes",
    "generate 'To be' ' '": "unknown argument ' ': put a prompt of several words in quotes",
    "--model ''": "--model is empty: give it a value, or leave it out",
    "-m ''": "-m is empty",
    "--tokenizer=": "--tokenizer is empty",
    "train README.md -o ''": "-o is empty",
    "train README.md -o x --config ''": "--config is empty",
    "convert shakespeare '' --to hf": "is there already",
    "--tokenizer byte": "unknown tokenizer 'byte'",
    "--vocab 100": "ids up to 255, outside the model's vocabulary of 100",
    "--temperature -1": "--temperature is -1.0: it must be a finite number, 0 or more",
    "--temperature nan": "--temperature is nan",
    "--top-p 0": "--top-p is 0.0: it must be a number, above 0 and at most 1",
    "--num-samples 0": "--num-samples is 0: it must be a whole number, 1 or more",
    "--seed 9223372036854775808": "--seed is 9223372036854775808: it must be a whole number",
    "--ids 3,x": "--ids is '3,x': it must be like 15496,995",
    "--ids ,": "--ids is ',': it must be like 15496,995",
    "--ids 999999999999999": "token 999999999999 is outside the vocabulary",
    "x --ids 3": "--ids and a prompt are two texts to continue",
    "--seed -1": "--seed is -1: it must be a whole number, 0 or more and below 2**63",
    "--max-new-tokens -1": "--max-new-tokens is -1: it must be a whole number, 0 or more",
    "--stop ''": "--stop is empty",
    "''": "the prompt is empty",
    "a\udcff": "not valid Unicode",
}


class Long(io.RawIOBase):
    """A stream of far more than a prompt may have, in one line."""

    def __init__(self) -> None:
        self.left = 64 << 20

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = min(len(buffer), self.left)
        buffer[:count] = b"a" * count
        self.left -= count
        return count


@pytest.mark.parametrize("argv", [["-"], ["--interactive"]])
def test_a_prompt_on_stdin_is_counted_before_it_fills_the_memory(argv, saved, cli, monkeypatch):
    monkeypatch.setattr(read_from, "MAX_PROMPT_BYTES", 1 << 20)
    stream = Long()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(stream)))
    status, out, err = cli(*argv, "-m", saved[0], "-n", 1)
    assert (status, out) == (2, "")
    assert "error: the prompt on stdin has more than 1 MiB" in err.splitlines()[-1]
    assert stream.left > 62 << 20  # the rest is not even read


def test_a_prompt_in_a_file_is_counted_too(saved, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(read_from, "MAX_PROMPT_BYTES", 1 << 20)
    (tmp_path / "prompt").write_bytes(b"a" * ((1 << 20) + 1))
    run = cli("--prompt-file", tmp_path / "prompt", "-m", saved[0], "-n", 1)
    assert is_refused(run, f"{tmp_path / 'prompt'}: it has more than 1 MiB")


def test_a_prompt_on_stdin_may_be_as_long_as_the_limit_and_no_longer(saved, cli, monkeypatch):
    monkeypatch.setattr(read_from, "MAX_PROMPT_BYTES", 8)
    for text, expected in ((b"8 bytes!", 0), (b"9 letters", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        status, out, _ = cli("-", "-m", saved[0], "-n", 0)
        assert (status, out) == (expected, "" if expected else "8 bytes!\n")


@pytest.mark.parametrize("argv", BAD)
def test_bad_input_is_one_line_and_exit_status_2(cli, monkeypatch, argv):
    monkeypatch.chdir(ROOT)
    assert is_refused(cli(*shlex.split(argv)), BAD[argv])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_what_was_made(number, endless):
    # the handler anew, because a shell's background job, as this may be, starts with it ignored
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tinygpt.commands.main import main; sys.exit(main())"
    )
    process = start(*endless, program=["-c", script])
    first = process.stdout.read(4)
    process.send_signal(number)
    status, rest, err = finish(process)
    assert status == 128 + number
    assert re.fullmatch(rb"Hi.+\n", first + rest, re.DOTALL)
    assert "Traceback" not in err
    assert re.search(r"\d+ tokens, the first after", err)
