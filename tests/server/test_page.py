"""The page at `/`, as someone with a browser has it."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import addresses, opened, seen
from conftest import needs_clang
from serving import SHAPE, serving

from tinygpt import GPT

sync_api = pytest.importorskip("playwright.sync_api", reason="it needs the extra `browser`")
expect = sync_api.expect

pytestmark = needs_clang
PROMPT = "Once upon"
SLIDERS = 14  # and the numbers beside them, of each of A and B
OLDER = "tinygpt tree"  # where earlier pages kept whatever model's tree
FILE = Path(__file__).parents[2] / "tinygpt/server/page.html"
expect.set_options(timeout=30_000)


@contextmanager
def shown(browser, running, width=1280, expected=()):
    """The page, ready to be used; what else the browser complained of by the end is a failure."""
    address = f"http://127.0.0.1:{running.port}/"
    with opened(browser, address, width) as (page, faults):
        expect(page.locator("#settings-B input")).to_have_count(SLIDERS)
        page.fill("#prompt", PROMPT)
        page.fill("#count", "8")
        yield page
        assert faults + addresses(page) == [*expected]


def settings(page, **values):
    """Set what stands beside the sliders."""
    for name, value in values.items():
        column = "B" if name.endswith("_B") else "A"
        page.fill(f"#{name.removesuffix('_B')}-{column}-number", str(value))


def write(page):
    """Write, and wait for the end."""
    page.click("#write")
    expect(page.locator("#said")).to_contain_text("a second")


def pieces(page, column="A"):
    """The tokens of a column, as they are shown."""
    inner = "each => each.firstChild.textContent"
    return page.locator(f"#text-{column} .token").evaluate_all(f"all => all.map({inner})")


def as_shown(text):
    """A token as the page shows it, but for the space at its beginning."""
    text = text.removeprefix("bytes:").replace("\n", "\u21b5").replace("\t", "\u21e5")
    text = re.sub("[\x00-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return text if text.strip() else re.sub(r"\s", "\u2423", text)


def completed(running, prompt=PROMPT, **more):
    """What the API says to the same request."""
    asked = {"prompt": prompt, "max_tokens": 8, "seed": 1, "logprobs": 10}
    answer = running.complete(**asked, temperature=1, **more)
    return answer["choices"][0]["logprobs"]


def kept_in(page):
    """The tree that the browser keeps of the one model that it knows."""
    take = "Object.entries(localStorage).filter(([name]) => name.startsWith('tinygpt tree'))"
    ((name, kept),) = page.evaluate(take)
    assert name != OLDER
    return json.loads(kept)


def ids_in(page):
    """The ids of the open text, from what the browser keeps."""
    kept = kept_in(page)
    places = [text["id"] for text in kept["texts"]]
    return ids_of(page, places.index(kept["open"]))


def ids_of(page, place):
    """The ids of one of the texts that the browser keeps."""
    kept = kept_in(page)
    texts = {text["id"]: text for text in kept["texts"]}

    def ids(text):
        before = [] if text["parent"] is None else ids(texts[text["parent"]])[: text["at"]]
        return before + [token["id"] for token in text["tokens"]]

    return ids(kept["texts"][place])


def choose(page, index, column="A"):
    page.click(f"#text-{column} .token[data-index='{index}']")
    expect(page.locator("#inspector")).to_be_visible()


def test_the_file_is_small_and_its_policy_lets_nothing_else_run(running):
    status, headers, html = running.ask("/")
    policy = headers["content-security-policy"]
    assert (status, html) == (200, FILE.read_text(encoding="utf-8"))
    assert len(html.encode()) <= 80_000
    assert policy.startswith("default-src 'self'; script-src 'sha256-")
    assert len(re.findall("'sha256-[^']{44}'", policy)) == 2
    assert "unsafe" not in policy
    assert not re.search(r"\sstyle=|\son\w+=|innerHTML|insertAdjacent|document\.write|://", html)


def test_a_text_is_typed_written_and_stopped(running, browser, monkeypatch):
    with shown(browser, running) as page:
        settings(page, temperature=1)
        write(page)
        expected = [*PROMPT, *completed(running)["tokens"]]
        assert pieces(page) == [as_shown(each) for each in expected]
        said = page.locator("#text-A .token .hear").all_inner_texts()
        assert said[0] == ""
        assert all(re.fullmatch(r", (< )?[0-9.]+ %", each) for each in said[1:])

        step = running.engine._step
        monkeypatch.setattr(running.engine, "_step", lambda: (time.sleep(0.05), step()))
        page.fill("#count", "100")
        page.click("#write")
        expect(page.locator("#text-A .token").nth(len(PROMPT) + 2)).to_be_visible()
        page.click("#stop")
        expect(page.locator("#said")).to_have_text("Stopped.")
        assert running.idle_within(1)
        assert len(PROMPT) + 2 < len(pieces(page)) < 100
        assert len(ids_in(page)) == len(pieces(page))


def test_writing_anew_ends_the_text_before_and_loses_neither(running, browser, monkeypatch):
    step = running.engine._step
    monkeypatch.setattr(running.engine, "_step", lambda: (time.sleep(0.05), step()))
    with shown(browser, running) as page:
        write(page)
        choose(page, 10)
        page.fill("#count", "50")
        page.click("#go-on")
        expect(page.locator("#text-A .token").nth(13)).to_be_visible()
        page.fill("#count", "3")
        page.click("#write")
        expect(page.locator("#said")).to_contain_text("3 tokens")
        assert len(pieces(page)) == len(ids_in(page)) == len(PROMPT) + 3
        expect(page.locator("#tree [role=treeitem]")).to_have_count(3)


def test_what_comes_late_of_a_token_is_not_shown_of_another(running, browser, monkeypatch):
    answer = running.server.studies._attention
    monkeypatch.setattr(
        running.server.studies, "_attention", lambda *asked: (time.sleep(0.5), answer(*asked))[1]
    )
    with shown(browser, running) as page:
        write(page)
        choose(page, 10)
        page.click("#tab-reads")
        write(page)  # the token is chosen no more
        expect(page.locator("#inspector")).to_be_hidden()
        time.sleep(0.7)
        expect(page.locator("#said.fault")).to_have_count(0)
        expect(page.locator("#text-A.reading")).to_have_count(0)


def test_what_could_not_be_written_is_said(running, browser):
    expected = (
        "says Failed to load resource: the server responded with a status of 400 (Bad Request)"
    )
    with shown(browser, running, expected=[expected]) as page:
        page.route("**/study/continue", lambda route: route.continue_(
            post_data=route.request.post_data.replace('"max_tokens":8', '"max_tokens":999')
        ))  # fmt: skip
        page.click("#write")
        expect(page.locator("#said.fault")).to_contain_text("more than the model's window of 128")
        expect(page.locator("#tree [role=treeitem]")).to_have_count(0)


def rows(page):
    """The alternatives: id, log-probability, and what the settings have made of it."""
    take = "each => ['token', 'logprob', 'kept'].map(name => Number(each.dataset[name]))"
    return page.locator(".others tbody tr").evaluate_all(f"all => all.map({take})")


def test_alternatives_are_those_of_the_api_before_and_after_the_settings(running, browser):
    with shown(browser, running) as page:
        settings(page, temperature=1)
        write(page)
        place = len(PROMPT) + 3
        choose(page, place)
        expect(page.locator(".others tbody tr")).to_have_count(10)
        found = rows(page)
        top = completed(running, ids_in(page)[:place])["top_logprobs"][0]
        names = page.locator(".others th .piece").evaluate_all(
            "all => all.map(each => each.firstChild.textContent)"
        )
        expected = {as_shown(name): logprob for name, logprob in top.items()}
        assert {n: row[1] for n, row in zip(names, found, strict=True)}.items() <= expected.items()
        np.testing.assert_allclose([e[2] for e in found], np.exp([e[1] for e in found]), rtol=1e-4)

        settings(page, temperature=0.5, top_k=4)
        expect(page.locator(".others caption")).to_contain_text("keep 4 of them")
        changed = rows(page)
        assert [each[:2] for each in changed] == [each[:2] for each in found]
        scaled = np.exp([2 * each[1] for each in found[:4]])
        np.testing.assert_allclose([e[2] for e in changed[:4]], scaled / scaled.sum(), rtol=1e-4)
        assert [each[2] for each in changed[4:]] == [0] * 6

        settings(page, temperature=0)
        expect(page.locator(".others caption")).to_contain_text("keep 1 of them")


def test_the_penalties_move_the_shares_of_what_was_written(running, browser):
    with shown(browser, running) as page:
        settings(page, temperature=1)
        page.fill("#count", "30")
        write(page)
        place = len(PROMPT) + 25
        written = ids_in(page)[len(PROMPT) : place]
        choose(page, place)
        expect(page.locator(".others tbody tr")).to_have_count(10)
        before = rows(page)
        frequency, presence = -0.7, -0.4
        page.fill("#frequency_penalty-A-number", str(frequency))
        asks = f'"presence_penalty":{presence}'
        with page.expect_response(lambda each: asks in (each.request.post_data or "")):
            page.fill("#presence_penalty-A-number", str(presence))
        expect(page.locator("#panel")).not_to_have_attribute("aria-busy", "true")
        expect(page.locator("#presence_penalty-A")).to_have_value(str(presence))
        after = rows(page)
        assert [each[:2] for each in after] == [each[:2] for each in before]
        counts = [written.count(int(each[0])) for each in before]
        assert any(counts), "choose a place where something likely was written before"
        # All shares have the same sum below them, but for what the penalties add.
        moved = [np.log(a[2] / b[2]) for a, b in zip(after, before, strict=True)]
        expected = [-frequency * count - presence * bool(count) for count in counts]
        np.testing.assert_allclose(np.subtract(moved, moved[0]), np.subtract(expected, expected[0]),
                                   atol=1e-3)  # fmt: skip
        page.fill("#count", "3")
        page.click("#go-on")
        texts_in(page, 2)
        expect(page.locator("#stop")).to_be_disabled()
        (line,) = told(page)
        assert line["written"] == 26
        assert "/study/continue" in page.locator("#curl").text_content()
        asked = {name: line[name] for name in ("prompt", "written", "frequency_penalty")}
        assert asked == {"prompt": ids_of(page, 0)[: place + 1], "written": 26,
                         "frequency_penalty": frequency}  # fmt: skip


def test_a_branch_begins_with_another_token_and_the_tree_is_kept(running, browser, tmp_path):
    with shown(browser, running) as page:
        write(page)
        first, place = ids_in(page), len(PROMPT) + 2
        choose(page, place)
        expect(page.locator(".others tbody tr")).to_have_count(10)
        other = next(each[0] for each in rows(page) if each[0] != first[place])
        page.click(f"tr[data-token='{other}'] button")
        expect(page.locator("#tree [role=treeitem]")).to_have_count(2)
        expect(page.locator("#stop")).to_be_disabled()
        branch = ids_in(page)
        assert branch[:place] == first[:place]
        assert branch[place] == other
        expect(page.locator("#text-A [aria-current=true]")).to_have_attribute(
            "data-index", str(place)
        )

        page.click("#go-on")
        expect(page.locator("#tree [role=treeitem]")).to_have_count(3)
        expect(page.locator("#stop")).to_be_disabled()
        assert ids_in(page)[: place + 1] == branch[: place + 1]

        with page.expect_download() as download:
            page.click("#export")
        download.value.save_as(file := tmp_path / "tree.json")
        labels = page.locator("#tree [role=treeitem] > span").all_inner_texts()
        before = pieces(page)
        page.reload()
        expect(page.locator("#tree [role=treeitem]")).to_have_count(3)
        assert pieces(page) == before

        page.click("#forget")
        expect(page.locator("#tree [role=treeitem]")).to_have_count(0)
        assert pieces(page) == []
        page.set_input_files("#file", file)
        expect(page.locator("#said")).to_have_text("3 texts.")
        assert page.locator("#tree [role=treeitem] > span").all_inner_texts() == labels
        assert pieces(page) == before


def texts_in(page, count):
    """Wait until the tree has so many texts."""
    expect(page.locator("#tree [role=treeitem]")).to_have_count(count)


def more_tabs(page):
    """The same page once more, in the same browser."""
    tab = page.context.new_page()
    tab.goto(page.url)
    expect(tab.locator("#name")).to_have_text("small")
    tab.fill("#count", "3")
    return tab


def test_each_model_has_a_tree_of_its_own(served_model, browser):
    other = GPT(replace(SHAPE, block_size=32))
    with serving(served_model) as first:
        port = first.port
        with opened(browser, f"http://127.0.0.1:{port}/") as (page, _):
            for _ in range(2):
                write(page)
            address = page.url
            page.goto("about:blank")
            context = page.context
            storage = context.storage_state()
    for model, had, wrote in ((other, 0, 1), (served_model, 2, 0), (other, 1, 0)):
        with serving(model, port=port) as running:
            assert running.port == port
            context = browser.new_context(storage_state=storage)
            page = context.new_page()
            page.goto(address)
            expect(page.locator("#name")).to_have_text("small")
            texts_in(page, had)
            page.fill("#prompt", "ab")
            page.fill("#count", "2")
            for _ in range(wrote):
                write(page)
            storage = context.storage_state()
            context.close()


def test_two_tabs_of_a_model_lose_no_text_of_each_other(running, browser):
    with shown(browser, running) as page:
        page.fill("#count", "3")
        write(page)
        write(page)
        tab = more_tabs(page)
        texts_in(tab, 2)
        write(tab)
        texts_in(page, 3)  # as soon as it is there
        write(page)
        texts_in(tab, 4)
        assert len({text["id"] for text in kept_in(page)["texts"]}) == 4
        page.reload()
        texts_in(page, 4)

        # What one tab forgets stays forgotten, but not what another has gone on from it.
        tab.focus("#tree [tabindex='0']")
        tab.keyboard.press("Delete")
        texts_in(page, 3)
        write(page)
        texts_in(tab, 4)
        tab.reload()
        texts_in(tab, 4)
        tab.click("#forget")
        texts_in(page, 0)
        assert pieces(page) == []
        write(page)
        texts_in(tab, 1)


def test_tabs_that_write_at_once_lose_no_text(running, browser):
    """Without word from each other, as when both write before either has heard of it."""
    deaf = "window.addEventListener('storage', (event) => event.stopImmediatePropagation(), true)"
    with shown(browser, running) as page:
        page.context.add_init_script(deaf)
        page.reload()
        page.fill("#prompt", PROMPT)
        page.fill("#count", "3")
        write(page)
        tab = more_tabs(page)
        choose(page, 2)
        page.keyboard.press("g")
        texts_in(page, 2)
        expect(page.locator("#stop")).to_be_disabled()
        texts_in(tab, 1)
        tab.focus("#tree [tabindex='0']")
        tab.keyboard.press("Delete")  # it knows nothing of the branch, which needs it
        texts_in(tab, 2)
        assert len(pieces(page)) > 3
        page.reload()
        texts_in(page, 2)


def test_what_another_tab_wrote_over_is_written_again(running, browser):
    with shown(browser, running) as page:
        write(page)
        tab = more_tabs(page)
        write(page)
        texts_in(tab, 2)
        tab.evaluate(
            "for (const [name, kept] of Object.entries(localStorage))"
            " if (name.startsWith('tinygpt tree')) localStorage.setItem(name, JSON.stringify("
            "{...JSON.parse(kept), texts: JSON.parse(kept).texts.slice(0, 1)}))"
        )
        texts_in(page, 2)
        tab.reload()
        texts_in(tab, 2)


def test_what_another_tab_wrote_over_is_forgotten_again(running, browser):
    """As when one keeps what it knows in the moment in which the other forgets."""
    kept = (
        "Object.fromEntries(Object.entries(localStorage)"
        ".filter(([name]) => name.startsWith('tinygpt tree')))"
    )
    back = "kept => { for (const name in kept) localStorage.setItem(name, kept[name]) }"
    for forget in ("all", "one"):
        with shown(browser, running) as page:
            write(page)
            write(page)
            tab = more_tabs(page)
            texts_in(tab, 2)
            before = page.evaluate(kept)
            if forget == "all":
                page.click("#forget")
            else:
                page.focus("#tree [tabindex='0']")
                page.keyboard.press("Delete")
            left = 0 if forget == "all" else 1
            texts_in(tab, left)
            tab.evaluate(back, before)
            page.wait_for_function(
                "left => JSON.parse(Object.entries(localStorage).find(([name]) =>"
                " name.startsWith('tinygpt tree'))[1]).texts.length === left",
                arg=left,
            )
            tab.reload()
            texts_in(tab, left)
            texts_in(page, left)


def older(page, **more):
    """A tree as pages before this one kept and exported it."""
    kept = kept_in(page)
    numbers = {text["id"]: number for number, text in enumerate(kept["texts"], 1)}
    for text in kept["texts"]:
        text["id"], text["parent"] = numbers[text["id"]], numbers.get(text["parent"])
    del kept["gone"]
    return json.dumps({**kept, "open": 1, **more})


def test_the_tree_of_an_earlier_page_is_taken_over_once(running, browser, tmp_path):
    with shown(browser, running) as page:
        write(page)
        choose(page, 11)
        page.click("#go-on")
        texts_in(page, 2)
        expect(page.locator("#stop")).to_be_disabled()
        labels = page.locator("#tree [role=treeitem] > span").all_inner_texts()
        (file := tmp_path / "tree.json").write_text(tree := older(page), encoding="utf-8")
        for mine, more in ((True, {}), (False, {"model": "gpt2"})):
            page.evaluate("localStorage.clear()")
            page.evaluate(
                "([name, tree]) => localStorage.setItem(name, tree)",
                [OLDER, older_tree := json.dumps({**json.loads(tree), **more})],
            )
            page.reload()
            texts_in(page, 2 if mine else 0)
            left = page.evaluate(f"localStorage.getItem('{OLDER}')")
            assert left == (None if mine else older_tree)
            if mine:
                assert page.locator("#tree [role=treeitem] > span").all_inner_texts() == labels
                page.reload()
                texts_in(page, 2)
                page.set_input_files("#file", file)  # they are there already
                expect(page.locator("#said")).to_have_text("2 texts.")
                texts_in(page, 2)
        page.evaluate(f"localStorage.removeItem('{OLDER}')")


def told(page):
    """The bodies of the requests that the curl lines show."""
    lines = page.locator("#curl").text_content().splitlines()
    return [json.loads(re.search("-d '(.*)'", line)[1]) for line in lines]


def test_the_curl_line_is_of_what_was_last_written(running, browser):
    with shown(browser, running) as page:
        settings(page, temperature=0.7)
        assert [(e["prompt"], e["temperature"]) for e in told(page)] == [(PROMPT, 0.7)]
        page.check("#compare")
        settings(page, temperature_B=0.3)
        assert [each["temperature"] for each in told(page)] == [0.7, 0.3]  # what Write would do
        write(page)
        before = told(page)
        assert [each["temperature"] for each in before] == [0.7, 0.3]
        choose(page, 11, "B")
        ids = page.locator("#text-B .token").count()
        page.fill("#count", "4")
        page.click("#go-on")
        texts_in(page, 3)
        expect(page.locator("#stop")).to_be_disabled()
        assert ids == len(PROMPT) + 8
        (branch,) = told(page)
        assert (branch["prompt"], branch["max_tokens"]) == (ids_of(page, -1)[:12], 4)
        assert branch["temperature"] == 0.3
        answer = running.complete(**branch, logprobs=0)["choices"][0]["logprobs"]["tokens"]
        assert [as_shown(each) for each in answer] == pieces(page, "B")[12:]
        settings(page, temperature_B=0.9)
        page.fill("#prompt", "else")
        assert told(page) == [branch]


def test_the_settings_are_kept(running, browser):
    with shown(browser, running) as page:
        page.check("#compare")
        settings(page, temperature=0.55, top_k=7, min_p_B=0.25)
        write(page)
        page.reload()
        expect(page.locator("#settings-B input")).to_have_count(SLIDERS)
        values = {"temperature-A": "0.55", "top_k-A": "7", "min_p-B": "0.25", "top_k-B": "0"}
        for name, value in values.items():
            expect(page.locator(f"#{name}")).to_have_value(value)
            expect(page.locator(f"#{name}-number")).to_have_value(value)
        page.fill("#count", "4")
        write(page)
        assert (told(page)[0]["temperature"], told(page)[0]["top_k"]) == (0.55, 7)
        page.evaluate(
            "for (const name of Object.keys(localStorage)) if (name.startsWith('tinygpt settings'))"
            ' localStorage.setItem(name, \'{"A": {"top_k": "<b>", "top_p": 7}, "B": 3}\')'
        )
        page.reload()  # what cannot be is not taken
        expect(page.locator("#top_k-A-number")).to_have_value("0")
        expect(page.locator("#top_p-A-number")).to_have_value("1")


def test_the_card_names_the_file(running, browser):
    with shown(browser, running) as page:
        page.click("#card summary")
        expect(page.locator("#card dt", has_text="file")).to_be_visible()
        expect(page.locator("#card dd", has_text="models/small")).to_be_visible()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("no", "it is not JSON"),
        ("[]", "its format is another"),
        ('{"format": "tinygpt tree 1", "model": "gpt2", "texts": []}', "of the model gpt2"),
        ('{"format": "tinygpt tree 1", "texts": [{"id": 1, "parent": 7}]}', "no place in it"),
        ('{"format": "tinygpt tree 1", "texts": [{"id": 1, "parent": null, "at": 3, '
         '"hidden": [], "tokens": []}]}', "begins where there is nothing"),
        ('{"format": "tinygpt tree 1", "texts": [{"id": 1, "parent": null, "at": 0, '
         '"hidden": [], "tokens": [{"id": "<b>"}]}]}', "a token is none"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_tree_changes_nothing(running, browser, tmp_path, content, told):
    (file := tmp_path / "tree.json").write_text(content, encoding="utf-8")
    with shown(browser, running) as page:
        write(page)
        before = pieces(page)
        page.set_input_files("#file", file)
        expect(page.locator("#said.fault")).to_contain_text(told)
        assert pieces(page) == before


def test_what_a_text_says_is_never_markup(running, browser):
    with shown(browser, running) as page:
        page.fill("#prompt", "<img src=x onerror=alert(1)><b>")
        write(page)
        choose(page, 3)
        assert page.locator("main img, main b").count() == 0
        assert pieces(page)[:5] == [*"<img", "\u2423"]


def test_two_texts_stand_beside_each_other(running, browser):
    with shown(browser, running) as page:
        page.check("#compare")
        settings(page, temperature=1, temperature_B=1, top_k_B=1)
        write(page)
        for column, more in (("A", {}), ("B", {"top_k": 1})):
            expected = [*PROMPT, *completed(running, **more)["tokens"]]
            assert pieces(page, column) == [as_shown(each) for each in expected]
        choose(page, 12, "B")
        expect(page.locator(".others caption")).to_contain_text("keep 1 of them")


def test_without_a_head_or_a_block_the_text_is_another(running, browser):
    with shown(browser, running) as page:
        settings(page, temperature=0)
        write(page)
        whole = ids_in(page)
        choose(page, 0)
        page.click("#tab-reads")
        page.click("[data-head='1.0']")
        page.check("#leave-head")
        expect(page.locator("#settings-A .out")).to_have_text("Left out: block 1 head 0.")
        expect(page.locator("#whole-note")).to_be_visible()
        write(page)
        assert '"heads":[[1,0]]' in page.locator("#curl").text_content()
        without_head = ids_in(page)
        choose(page, len(PROMPT))
        page.check("#leave-block")
        expect(page.locator("#settings-A .out")).to_have_text("Left out: block 1, block 1 head 0.")
        write(page)
        without_block = ids_in(page)
        for ids, more in ((without_head, {}), (without_block, {"blocks": [1]})):
            asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "heads": [[1, 0]]}
            status, _, text = running.ask("/study/continue", {**asked, **more})
            assert status == 200
            events = [json.loads(e[6:]) for e in text.split("\n\n")[:-2]]
            assert ids == [*PROMPT.encode(), *(e["id"] for e in events if "id" in e)]
        assert whole != without_head != without_block
        page.click("#settings-A .whole")
        write(page)
        assert ids_in(page) == whole


def test_the_map_is_the_attention_to_a_255th(running, browser):
    with shown(browser, running) as page:
        write(page)
        choose(page, 9)
        page.click("#tab-reads")
        page.click("[data-head='0.1']")
        expect(page.locator("canvas")).to_have_attribute("aria-label", re.compile("0, head 1"))
        ids = ids_in(page)
        asked = {"prompt": ids, "block": 0, "head": 1}
        weights = running.ask("/study/attention", asked)[2]["weights"]
        size, pixels = page.locator("canvas").evaluate(
            "each => [[each.width, each.height], [...each.getContext('2d')"
            ".getImageData(0, 0, each.width, each.height).data]]"
        )
        assert size == [len(ids)] * 2
        rgba = np.array(pixels).reshape(len(ids), len(ids), 4)
        assert (rgba[..., 3] == 255).all()
        expected = np.zeros((len(ids), len(ids)))
        for i, row in enumerate(weights):
            expected[i, : i + 1] = row
        for colour in range(3):
            assert np.abs(1 - rgba[..., colour] / 255 - expected).max() <= 1 / 255
        tints = page.locator("#text-A .token").evaluate_all(
            "all => all.map(each => Number(each.style.getPropertyValue('--reads')))"
        )
        np.testing.assert_allclose(tints, expected[9] / expected[9].max(), atol=1e-3)
        expect(page.locator("#head-about")).to_contain_text("previous 0.")


def test_layers_and_parts_are_those_of_the_api(running, browser):
    with shown(browser, running) as page:
        write(page)
        choose(page, 11)
        page.click("#tab-layers")
        expect(page.locator("#panel tbody tr")).to_have_count(5)
        ids = ids_in(page)
        places = running.ask("/study/lens", {"prompt": ids, "index": 10})[2]["places"]
        ranks = page.locator("#panel tbody td:last-child").all_inner_texts()
        assert ranks == [str(each["rank"]) for each in places]
        page.click("#tab-parts")
        expect(page.locator("#panel caption")).to_contain_text("What spoke for")
        expect(page.locator("#panel tbody tr").last).to_contain_text("sum")


def test_a_post_norm_model_says_why_it_has_no_parts(browser):
    with serving(GPT(replace(SHAPE, norm="post", block_size=32))) as post:
        address = f"http://127.0.0.1:{post.port}/"
        with opened(browser, address) as (page, _):
            page.fill("#prompt", "ab")
            page.fill("#count", "2")
            write(page)
            choose(page, 1)
            page.click("#tab-parts")
            expect(page.locator("#panel")).to_contain_text("post-norm scales the sum")


def test_nothing_is_written_before_the_model_is_known(running, browser):
    with shown(browser, running) as first:
        page, held = first.context.new_page(), []
        page.route("**/study/model", lambda route: held.append(route))
        page.goto(first.url)
        page.fill("#prompt", PROMPT)
        page.press("#prompt", "Control+Enter")
        expect(page.locator("#write")).to_be_disabled()
        held[0].continue_()
        expect(page.locator("#write")).to_be_enabled()
        write(page)


def test_everything_is_had_by_the_keyboard(running, browser):
    with shown(browser, running) as page:
        page.focus("#prompt")
        press = page.keyboard.press
        press("Control+Enter")
        expect(page.locator("#said")).to_contain_text("a second")
        expect(page.locator("#text-A [tabindex='0']")).to_have_count(1)
        press("Tab")
        assert page.evaluate("document.activeElement.id") == "write"
        press("x")
        at = "Number(document.activeElement.dataset.index)"
        assert page.evaluate(at) == 0
        press("End")
        last = page.evaluate(at)
        press("ArrowLeft")
        press("ArrowLeft")
        assert page.evaluate(at) == last - 2
        press("Tab")  # one stop for the whole text
        assert page.evaluate("document.activeElement.closest('#text-A')") is None
        press("Shift+Tab")
        assert page.evaluate(at) == last - 2
        press("Enter")
        expect(page.locator("#text-A [aria-current=true]")).to_have_attribute(
            "data-index", str(last - 2)
        )
        press("2")
        expect(page.locator("canvas")).to_be_visible()
        page.focus(".heads [tabindex='0']")
        press("ArrowDown")
        press("Enter")
        expect(page.locator("#head-about")).to_contain_text("Block 1, head 0")
        press("g")
        expect(page.locator("#tree [role=treeitem]")).to_have_count(2)
        expect(page.locator("#stop")).to_be_disabled()
        press("r")
        assert page.evaluate("document.activeElement.role") == "treeitem"
        press("ArrowLeft")
        press("Enter")
        expect(page.locator("#tree [aria-selected=true]")).to_have_count(1)
        assert len(pieces(page)) == last + 1
        press("ArrowLeft")
        expect(page.locator("#tree [role=treeitem]")).to_have_count(1)
        press("ArrowRight")
        expect(page.locator("#tree [role=treeitem]")).to_have_count(2)
        press("ArrowDown")
        press("Delete")
        expect(page.locator("#tree [role=treeitem]")).to_have_count(1)
        press("?")
        expect(page.locator("#keys")).to_be_visible()
        press("Escape")
        expect(page.locator("#keys")).to_be_hidden()
        page.click("#help")
        page.click("#keys button")
        expect(page.locator("#keys")).to_be_hidden()


@pytest.mark.parametrize(
    ("width", "media"),
    [
        (320, {}),
        (640, {"reduced_motion": "reduce"}),  # 1280 pixels at 200 %
        (1280, {"color_scheme": "dark"}),
        (320, {"color_scheme": "dark"}),
    ],
)
def test_it_can_be_read_by_all_at_any_width(running, browser, width, media):
    with shown(browser, running, width) as page:
        page.emulate_media(**media)
        faults = {"empty": seen(page)}
        page.check("#compare")
        write(page)
        page.locator("summary").evaluate_all("all => all.forEach(each => each.click())")
        for tab in ("others", "reads", "layers", "parts"):
            choose(page, 11)
            page.click(f"#tab-{tab}")
            expect(page.locator("#panel table")).to_be_visible()
            expect(page.locator("#panel")).not_to_have_attribute("aria-busy", "true")
            faults[tab] = seen(page)
        page.click("#help")
        faults["keys"] = seen(page)
        assert {name: each for name, each in faults.items() if each} == {}
        if "reduced_motion" in media:
            moves = "getComputedStyle(document.querySelector('.bar')).transitionDuration"
            assert page.evaluate(moves) == "0s"


def test_lines_say_it_where_the_system_chooses_the_colours(running, browser, monkeypatch):
    answer = running.server.studies._attention

    def one_strong(ids, asked):
        found = answer(ids, asked)
        for i, each in enumerate(found.get("heads", [])):
            each["previous"] = [0.9, 0.1, 0.0, 0.0][i]
        return found

    monkeypatch.setattr(running.server.studies, "_attention", one_strong)
    style = "(each, name) => getComputedStyle(each)[name]"
    every = "(all, name) => all.map((each) => getComputedStyle(each)[name])"
    with shown(browser, running) as page:
        page.emulate_media(forced_colors="active")
        settings(page, temperature=1)
        write(page)
        samples = page.locator(".samples .token")
        assert samples.evaluate_all(every, "textDecorationLine") == ["none", *["underline"] * 3]
        widths = [
            float(each.removesuffix("px"))
            for each in samples.evaluate_all(every, "textDecorationThickness")
        ]
        assert widths == sorted(widths)
        assert widths[1] < widths[2] < widths[3]
        shares = page.locator("#text-A .token").evaluate_all(
            "all => all.map((each) => [Number(each.style.getPropertyValue('--rarity')),"
            " parseFloat(getComputedStyle(each).textDecorationThickness)])"
        )
        np.testing.assert_allclose([e[1] for e in shares], [4 * e[0] for e in shares], atol=0.01)

        choose(page, 11)
        expect(page.locator(".others tbody tr")).to_have_count(10)
        bars = page.locator(".others tr:first-child .bar").evaluate_all(every, "backgroundColor")
        ground = page.locator(".others").evaluate(style, "backgroundColor")
        assert len({*bars, ground, page.evaluate("getComputedStyle(document.body)"
                                                 ".backgroundColor")}) >= 3  # fmt: skip
        tabs = page.locator("[role=tab]").evaluate_all(every, "borderBottomColor")
        assert len(set(tabs)) == 2
        assert tabs.count(tabs[0]) == 1

        page.click("#tab-reads")
        expect(page.locator("#head-about")).to_contain_text("previous 0.")
        borders = page.locator(".heads button").evaluate_all(every, "borderTopWidth")
        assert float(borders[0][:-2]) >= float(borders[1][:-2]) + 2 > float(borders[2][:-2]) + 2
        assert page.locator("#text-A .token.read").count()
        assert seen(page) == []


def test_a_token_in_writing_is_not_announced(running, browser):
    """A reader hears that a text is written, and when it is done; not each of its tokens."""
    with shown(browser, running) as page:
        page.evaluate(
            "window.heard = []; new MutationObserver(() => heard.push("
            "document.querySelector('#said').textContent)).observe("
            "document.querySelector('#said'), {childList: true})"
        )
        write(page)
        heard = page.evaluate("heard")
        assert heard[0] == "Writing \u2026"
        assert len(heard) == 2
        assert page.locator("[aria-live], [role=log], [role=alert]").count() == 0


def test_a_key_is_asked_for_where_the_server_wants_one(served_model, browser):
    with serving(served_model, api_key="secret") as keyed:
        address = f"http://127.0.0.1:{keyed.port}/"
        with opened(browser, address) as (page, _):
            page.fill("#key", "secret")
            page.keyboard.press("Enter")
            expect(page.locator("#settings-A input")).to_have_count(SLIDERS)
            page.fill("#count", "4")
            write(page)
            assert page.evaluate("sessionStorage.getItem('tinygpt key')") == "secret"
            assert "secret" not in page.locator("#curl").text_content()
            assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.parametrize("key", ["\u043a\u043b\u044e\u0447", "cl\u00e9", "two words", "\U0001f511"])
def test_a_key_that_no_header_can_have_is_asked_for_again(served_model, browser, key):
    with serving(served_model, api_key="secret") as keyed:
        address = f"http://127.0.0.1:{keyed.port}/"
        with opened(browser, address) as (page, _):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            expect(page.locator("#said")).to_contain_text("plain letters")
            expect(page.locator("#key-form")).to_be_visible()
            expect(page.locator("#key")).to_be_focused()
            assert page.evaluate("sessionStorage.getItem('tinygpt key')") is None
            page.evaluate("key => sessionStorage.setItem('tinygpt key', key)", key)
            page.reload()  # as an earlier page may have left it
            expect(page.locator("#said")).to_contain_text("no API key")
            page.fill("#key", " secret ")
            page.keyboard.press("Enter")
            expect(page.locator("#settings-A input")).to_have_count(SLIDERS)


def test_it_can_be_read_while_a_look_is_computed(running, browser, monkeypatch):
    release, usual = threading.Event(), running.server.studies._lens
    monkeypatch.setattr(running.server.studies, "_lens", lambda *a: release.wait(120) and usual(*a))
    with shown(browser, running) as page:
        write(page)
        choose(page, 11)
        expect(page.locator(".others tbody tr")).to_have_count(10)
        page.click("#tab-layers")
        expect(page.locator("#panel")).to_have_attribute("aria-busy", "true")
        try:
            assert page.locator("#panel").inner_text()
            assert seen(page) == []
        finally:
            release.set()
