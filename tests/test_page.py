"""The server's page in a headless Chromium. Needs playwright and a Chromium, and is skipped without them.

A few tests ask a real server, where SERVER says where one is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import urllib.request

import pytest
from page_proxy import serve

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ["chromium-headless-shell", "chromium", "google-chrome"])), None
)
if not CHROMIUM:
    pytest.skip("no Chromium was found", allow_module_level=True)

SERVER = os.environ.get("SERVER", "127.0.0.1:8177")  # of the few tests that ask a real one
HOSTILE = """# Heading

Some `inline` code, **bold**, ~5 and ~6.

| Name | Size |
|:-----|-----:|
| one  | 1    |
| two  | 2    |

3. third
4. fourth

Then:

- first
  - nested
- [x] done

```python
print("<b>hello</b>")
```

<script>window.hacked = 1</script>

Inline <script>window.hacked = 2</script> and <img src=x onerror="window.hacked = 3"> here.

<svg/onload=window.hacked=4><iframe srcdoc="<script>parent.hacked=5</script>"></iframe>
<style>body { display: none }</style><form id=thread><input name=body></form>

![a picture](https://example.com/a.png) ![bad](javascript:window.hacked=6)
[good](https://example.com/page "title") [bad](javascript:window.hacked=7) [data](data:text/html,x)
<a href="javascript:window.hacked=8" onclick="window.hacked=9">raw</a> https://example.com/auto
[quote](https://example.com/"onmouseover="window.hacked=10)

```"><img/src=x/onerror=window.hacked=11>
code
```

[late][ref]

[ref]: https://example.com/late
"""
WIDE = (
    "| "
    + " | ".join(["wide"] * 40)
    + " |\n|"
    + "---|" * 40
    + "\n| "
    + " | ".join(["cell"] * 40)
    + " |\n\n"
    + "word" * 200
    + "\n\n```\n"
    + "x" * 500
    + "\n```\n"
)
DEEP = ">" * 20000 + " deep"
calls = []  # what the page asked of the stub


def chunk(**fields):
    return b"data: " + json.dumps({"choices": [], **fields}).encode() + b"\r\n\r\n"


def words(text):
    return chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])


def stub(handler, request):
    """Answers "stub NAME"; every other chat goes to the server."""
    if request is None:
        if not server_answers():
            handler.head(200, "application/json")
            handler.wfile.write(b'{"data": [{"id": "stub", "max_model_len": 4096}]}')
            return True
        return False
    asked = request["messages"][-1]["content"]
    calls.append(request)
    if not asked.startswith("stub "):
        return False
    name = asked.split()[1]
    if name == "key" and handler.headers.get("Authorization") != "Bearer right":
        handler.head(401, "application/json")
        handler.wfile.write(b'{"error": {"message": "Wrong key"}}')
        return True
    if name == "bad":
        handler.head(400, "application/json")
        handler.wfile.write(b'{"error": {"message": "The prompt is too long"}}')
        return True
    handler.head(200, "text/event-stream")
    text = {"hostile": HOSTILE, "wide": WIDE, "deep": DEEP, "slow": "word " * 400}.get(
        name, f"Answer {len(calls)} é."
    )
    step, pause = (5, 0.05) if name in ("slow", "cut") else (7, 0.001)
    if name == "deep":
        step = len(text)
    try:
        for at in range(0, len(text), step):
            raw = words(text[at : at + step])
            half = len(raw) // 2  # events do not end where packets do
            handler.wfile.write(raw[:half])
            handler.wfile.flush()
            handler.wfile.write(raw[half:])
            handler.wfile.flush()
            time.sleep(pause)
        if name == "cut":
            return True
        if name == "fail":
            handler.wfile.write(b'data: {"error": {"message": "Out of memory"}}\n\n')
            return True
        handler.wfile.write(chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]))
        handler.wfile.write(chunk(usage={"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100}))
        handler.wfile.write(b"data: [DONE]\n\n")
    except OSError:
        calls.append("closed")
    return True


def server_answers():
    try:
        return urllib.request.urlopen(f"http://{SERVER}/v1/models", timeout=3).status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def address():
    name, number = SERVER.rsplit(":", 1)
    service = serve(0, (name, int(number)), stub)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_port}/"
    service.shutdown()


@pytest.mark.skipif("KEYED" not in os.environ, reason="KEYED=address,key of a server with a key is not set")
def test_real_server_with_a_key(browser):
    server, key = os.environ["KEYED"].split(",")
    name, number = server.rsplit(":", 1)
    service = serve(0, (name, int(number)))
    threading.Thread(target=service.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{service.server_port}/")
    expect(page.locator("#notice")).to_contain_text("asks for a key")
    page.fill("#input", "Hello")
    page.press("#input", "Enter")
    expect(page.locator("article.assistant .note")).to_contain_text("asks for a key")
    page.click("#open-settings")
    page.fill("#key", key)
    page.press("#key", "Tab")
    expect(page.locator("#notice")).to_be_hidden()
    page.get_by_text("Done").click()
    page.get_by_label("Retry").click()
    expect(page.locator("#status")).to_contain_text("tokens a second")
    answered(page)
    page.close()
    service.shutdown()


@pytest.fixture(scope="session")
def browser():
    with playwright_api.sync_playwright() as api:
        launched = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def context(browser, address):
    made = browser.new_context(viewport={"width": 900, "height": 700})
    made.grant_permissions(["clipboard-read", "clipboard-write"], origin=address.rstrip("/"))
    yield made
    made.close()


@pytest.fixture
def page(context, address):
    opened = context.new_page()
    opened.set_default_timeout(8000)
    problems = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on(
        "console",
        lambda line: (
            problems.append(line.text)
            if line.type == "error" and "Failed to load resource" not in line.text
            else None
        ),
    )
    outside = []
    opened.on(
        "request",
        lambda request: (
            outside.append(request.url) if not request.url.startswith((address, "data:")) else None
        ),
    )
    calls.clear()
    opened.goto(address)
    yield opened
    assert problems == []
    assert outside == []


def last_request():
    # The stub may note late that the page had closed an earlier answer.
    return [one for one in calls if one != "closed"][-1]


def say(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def answered(page):
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator("article.assistant").last).to_have_attribute("aria-busy", "false")


def answers(page):
    return page.locator("article.assistant .body")


@pytest.mark.skipif(not server_answers(), reason=f"no server answers at {SERVER}")
def test_a_server_serves_the_page_itself(browser):
    page = browser.new_page()
    page.goto(f"http://{SERVER}/")
    say(page, "Hello")
    answered(page)
    assert len(answers(page).inner_text()) > 3
    expect(page.locator("#status")).to_contain_text("tokens a second")
    page.close()


@pytest.mark.skipif(not server_answers(), reason=f"no server answers at {SERVER}")
def test_real_server_streams(page):
    expect(page.locator("#status")).to_contain_text("context 0 of 4096 tokens used")
    say(page, "Hello")
    expect(page.locator("#send")).to_have_text("Send")
    answered(page)
    assert len(answers(page).inner_text()) > 3
    expect(page.locator("#status")).to_contain_text("tokens a second")
    assert "context 0 of" not in page.inner_text("#status")
    page.get_by_label("Retry").click()
    answered(page)
    expect(page.locator(".branches")).to_contain_text("2/2")
    page.click("#open-settings")
    page.fill("#temperature", "0.5")
    page.fill("#top_p", "0.9")
    page.fill("#max_tokens", "2")
    page.fill("#seed", "3")
    page.fill("#system", "Be short.")
    page.get_by_text("Done").click()
    say(page, "And now?")
    answered(page)
    expect(page.locator("article").last).to_contain_text("token limit")
    assert last_request()["seed"] == 3 and last_request()["max_tokens"] == 2
    assert [m["role"] for m in last_request()["messages"]] == ["system", "user", "assistant", "user"]
    assert "error" not in page.inner_text("#thread").lower()


def test_streams_and_shows_usage(page):
    say(page, "stub slow")
    expect(answers(page)).to_contain_text("word word")
    early = len(answers(page).inner_text())
    expect(page.locator("article.assistant")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#status")).to_contain_text("tokens a second")
    page.wait_for_timeout(400)
    assert len(answers(page).inner_text()) > early
    page.keyboard.press("Escape")
    answered(page)
    say(page, "stub plain")
    answered(page)
    expect(answers(page).last).to_contain_text("é.")
    assert set(last_request()) == {"messages", "stream", "stream_options"}
    expect(page.locator("#status")).to_contain_text("context 100 of 4096 tokens used")


def test_markdown_is_drawn_and_harmless(page):
    say(page, "stub hostile")
    answered(page)
    body = answers(page)
    assert body.locator("table tbody tr").count() == 2
    assert body.locator("td").nth(1).evaluate("(e) => getComputedStyle(e).textAlign") == "right"
    assert body.locator("ol").get_attribute("start") == "3"
    assert body.locator("h1").inner_text() == "Heading"
    assert body.locator("ul ul li").count() == 1
    assert body.locator("p > code").first.inner_text() == "inline"
    assert body.locator("del").count() == 0
    expect(body.locator(".code").first).to_contain_text('print("<b>hello</b>")')
    expect(body.locator(".code-head span").first).to_have_text("python")
    text = body.inner_text()
    assert "<script>window.hacked = 1</script>" in text
    assert '<img src=x onerror="window.hacked = 3">' in text
    found = page.evaluate("""() => [...document.querySelectorAll('#thread *')].map((e) => [e.localName,
        ...e.attributes].map((a) => a.name ? a.name + '=' + a.value : a))""")
    names = {one[0] for one in found}
    assert not names & {"script", "img", "svg", "iframe", "style", "form", "input", "object", "b"}
    attributes = [a for one in found for a in one[1:]]
    assert not [a for a in attributes if a.startswith(("on", "style=", "src", "id=", "name="))]
    links = page.evaluate(
        "() => [...document.querySelectorAll('#thread a')].map((a) => [a.href, a.target, a.rel])"
    )
    assert {link[0] for link in links} >= {
        "https://example.com/a.png",
        "https://example.com/page",
        "https://example.com/auto",
        "https://example.com/late",
    }
    assert all(
        href.startswith("https://example.com/") and target == "_blank" and "noopener" in rel
        for href, target, rel in links
    )
    page.wait_for_timeout(300)
    assert page.evaluate("() => window.hacked") is None
    expect(page.locator("#input")).to_be_visible()


def test_each_layer_holds_alone(page):
    """Markdown without the sanitiser, and the sanitiser without the Markdown's escaping."""
    written = page.evaluate("(text) => markdown.parse(text)", HOSTILE)
    for tag in (
        "<script",
        "<img",
        "<svg",
        "<iframe",
        "<style",
        "<form",
        "<input",
        'href="javascript',
        'href="data',
    ):
        assert tag not in written.lower()
    cleaned = page.evaluate("""() => { const box = document.createElement('div');
        box.append(cleanFragment('<p id=thread style="color:red" onclick="x()">a<script>x()</' + 'script>'
            + '<img src=x onerror="x()"><a href="javascript:x()" target="y">b</a><iframe src="/"></iframe>'
            + '<svg><a xlink:href="javascript:x()">c</a></svg><form><input></form></p>'));
        return box.innerHTML; }""")
    for part in ("script", "img", "iframe", "svg", "form", "input", "on", "style", "id="):
        assert part not in cleaned.replace("noopener", "").lower(), cleaned


def test_policy_stops_scripts_even_past_the_sanitiser(context, address):
    page = context.new_page()  # not the fixture: here the browser must complain
    page.goto(address)
    page.evaluate("""() => { document.body.insertAdjacentHTML('beforeend',
        '<img src="data:," onerror="window.hacked = 1"><a id="bait" onclick="window.hacked = 2">x</a>');
        document.getElementById('bait').click(); }""")
    page.wait_for_timeout(200)
    assert page.evaluate("() => window.hacked") is None


def test_deep_nesting_falls_back(page):
    say(page, "stub deep")
    answered(page)
    expect(answers(page)).to_contain_text("deep")


def test_stop_keeps_the_text(page):
    say(page, "stub slow")
    expect(answers(page)).to_contain_text("word word word")
    page.click("#send")
    answered(page)
    expect(page.locator("article.assistant")).to_contain_text("Stopped.")
    kept = answers(page).inner_text()
    assert kept.startswith("word word word") and len(kept) < 1500
    page.wait_for_timeout(500)
    assert answers(page).inner_text() == kept
    assert "closed" in calls
    page.reload()
    assert answers(page).inner_text() == kept


def test_retry_makes_a_branch(page):
    say(page, "stub plain")
    answered(page)
    first = answers(page).inner_text()
    page.get_by_label("Retry").click()
    answered(page)
    second = answers(page).inner_text()
    assert first != second
    expect(page.locator(".branches")).to_contain_text("2/2")
    page.get_by_label("Previous branch").click()
    assert answers(page).inner_text() == first
    expect(page.locator(".branches")).to_contain_text("1/2")
    say(page, "stub follow")
    answered(page)
    assert last_request()["messages"][1]["content"] == first
    page.get_by_label("Next branch").click()
    assert answers(page).all_inner_texts() == [second]
    page.reload()
    assert answers(page).all_inner_texts() == [second]
    page.get_by_label("Previous branch").click()
    assert answers(page).count() == 2


def test_edit_makes_a_branch(page):
    say(page, "stub one")
    answered(page)
    page.get_by_label("Edit message").click()
    page.get_by_label("Edit your message").fill("stub two")
    page.get_by_label("Edit your message").press("Enter")
    answered(page)
    expect(page.locator("article.user .body")).to_have_text("stub two")
    assert [m["content"] for m in last_request()["messages"]] == ["stub two"]
    page.get_by_label("Previous branch").click()
    expect(page.locator("article.user .body")).to_have_text("stub one")
    page.get_by_label("Edit message").click()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Edit message")).to_be_focused()


def test_reload_keeps_all(page):
    page.click("#open-settings")
    page.fill("#system", "Be kind.")
    page.fill("#key", "secret-key")
    page.keyboard.press("Escape")
    say(page, "stub plain")
    answered(page)
    say(page, "stub slow")
    expect(answers(page).last).to_contain_text("word word word")
    page.fill("#input", "half a thought")
    page.reload()
    expect(page.locator("#input")).to_have_value("half a thought")
    assert page.locator("article").count() == 4
    expect(answers(page).last).to_contain_text("word word")
    expect(page.locator("article").last).to_contain_text("cut short")
    assert page.input_value("#system") == "Be kind."
    assert page.input_value("#key") == "secret-key"
    assert "secret-key" not in page.evaluate("() => JSON.stringify(localStorage)")
    page.get_by_label("Retry").last.click()
    expect(page.locator(".branches")).to_have_count(0)  # none while it writes
    page.keyboard.press("Escape")
    expect(page.locator(".branches")).to_contain_text("2/2")
    expect(page.locator("#input")).to_have_value("half a thought")


def test_crash_keeps_what_was_written(context, address):
    page = context.new_page()
    page.goto(address)
    say(page, "stub slow")
    expect(answers(page)).to_contain_text("word " * 10)
    page.evaluate(
        "() => localStorage.setItem('marker', answerLength())".replace(
            "answerLength()", "document.querySelector('article.assistant .body').textContent.length"
        )
    )
    with contextlib.suppress(playwright_api.Error):
        page.goto("chrome://crash", timeout=3000)  # no pagehide, no time to save
    again = context.new_page()
    again.goto(address)
    expect(again.locator("article")).to_have_count(2)
    expect(again.locator("article").last).to_contain_text("cut short")
    assert (
        len(answers(again).inner_text()) >= int(again.evaluate("() => localStorage.getItem('marker')")) - 60
    )


def test_full_storage_is_said(page):
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    say(page, "stub plain")
    expect(page.locator("#notice")).to_contain_text("could not save")
    answered(page)
    expect(answers(page)).to_contain_text("Answer")


def test_long_conversation_stays_quick(page):
    page.evaluate("""() => {
        const nodes = [], chosen = {};
        for (let i = 0; i < 1000; i += 1) {
            nodes.push({ id: 'n' + i, parent: i ? 'n' + (i - 1) : '', role: i % 2 ? 'assistant' : 'user',
                content: 'Some **text** number ' + i, born: i, time: i, state: 'done' });
            chosen[i ? 'n' + (i - 1) : ''] = 'n' + i;
        }
        localStorage.setItem('chat.tree.long', JSON.stringify({ id: 'long', system: '', updated: 1, nodes, chosen }));
        sessionStorage.setItem('chat.current', 'long');
    }""")
    page.reload()
    expect(page.locator("article")).to_have_count(1000)
    say(page, "stub plain")
    answered(page)
    took = page.evaluate(
        "() => { const t = performance.now(); drawList(); drawThread(); return performance.now() - t; }"
    )
    print("a redraw of 1,002 messages took", round(took), "ms")
    assert took < 1000


def test_screenshots(page):
    if not os.environ.get("SHOTS"):
        pytest.skip("SHOTS is not set")
    page.set_viewport_size({"width": 1100, "height": 1500})
    say(page, "stub hostile")
    answered(page)
    page.screenshot(path=os.environ["SHOTS"] + "/wide.png")


def test_conversations(page):
    say(page, "stub plain")
    answered(page)
    page.click("#new")
    expect(page.locator("article")).to_have_count(0)
    page.fill("#input", "draft of the second")
    page.select_option("#conversations", label="stub plain")
    expect(page.locator("article")).to_have_count(2)
    expect(page.locator("#input")).to_have_value("")
    page.select_option("#conversations", label="New conversation")
    expect(page.locator("#input")).to_have_value("draft of the second")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#delete")
    expect(page.locator("article")).to_have_count(2)
    assert len(page.evaluate("() => Object.keys(localStorage)")) == 1


def test_two_tabs_do_not_lose_messages(page, context, address):
    say(page, "stub one")
    answered(page)
    other = context.new_page()
    other.goto(address)
    expect(other.locator("article")).to_have_count(2)
    say(other, "stub slow")
    expect(other.locator("article")).to_have_count(4)
    page.get_by_label("Retry").first.click()
    answered(page)
    other.keyboard.press("Escape")
    answered(other)
    for one in (page, other):
        one.reload()
        count = one.evaluate("() => JSON.parse(Object.values(localStorage)[0]).nodes.length")
        assert count == 5
    assert "word" in other.evaluate("() => Object.values(localStorage)[0]")


@pytest.mark.parametrize(
    "name, said",
    [
        ("bad", "The server refused: The prompt is too long."),
        ("key", "The server asks for a key: enter it under Settings. Wrong key."),
        ("cut", "The connection ended before the answer was complete."),
        ("fail", "The server stopped with an error: Out of memory."),
    ],
)
def test_errors_in_words(page, name, said):
    say(page, "stub " + name)
    expect(page.locator("article.assistant .note")).to_have_text(said)
    expect(page.get_by_label("Retry")).to_be_visible()
    if name in ("cut", "fail"):
        expect(answers(page)).to_contain_text("Answer 1")
    if name == "key":
        page.click("#open-settings")
        page.fill("#key", "right")
        page.get_by_text("Done").click()
        page.get_by_label("Retry").click()
        expect(answers(page)).to_contain_text("Answer")
        answered(page)
        expect(page.locator(".branches")).to_have_count(0)  # the empty failure is replaced


def test_no_server(page, context):
    context.set_offline(True)
    say(page, "stub plain")
    expect(page.locator("article.assistant .note")).to_have_text(
        "The server could not be reached. Is it running?"
    )
    context.set_offline(False)
    page.get_by_label("Retry").click()
    expect(answers(page)).to_contain_text("Answer")


def test_copy(page):
    say(page, "stub hostile")
    answered(page)
    page.locator(".code-head button").first.click()
    expect(page.locator(".code-head button").first).to_have_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == 'print("<b>hello</b>")'
    page.get_by_label("Copy message").last.click()
    expect(page.get_by_label("Copy message").last).to_have_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == HOSTILE


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow(page, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": 360, "height": 640})
    say(page, "stub wide")
    answered(page)
    page.get_by_label("Retry").click()
    answered(page)
    expect(page.locator(".branches")).to_contain_text("2/2")
    too_wide = """() => ['html', 'body', 'header', 'main', 'footer', '#thread', 'dialog']
        .filter((s) => { const e = document.querySelector(s); return e.scrollWidth > Math.max(e.clientWidth, 0) + 1
          || e.getBoundingClientRect().right > 360; })"""
    assert page.evaluate(too_wide) == []
    outside = page.evaluate("""() => [...document.querySelectorAll('button, select, textarea, .message')]
        .filter((e) => e.getBoundingClientRect().right > 360.5 || e.getBoundingClientRect().left < 0).length""")
    assert outside == 0
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 251, 250)", "dark": "rgb(25, 26, 27)"}[scheme]
    page.click("#open-settings")
    assert page.evaluate(too_wide) == []
    if os.environ.get("SHOTS"):
        page.screenshot(path=f"{os.environ['SHOTS']}/settings-{scheme}.png")
        page.keyboard.press("Escape")
        page.screenshot(path=f"{os.environ['SHOTS']}/narrow-{scheme}.png")


def tab_to(page, label, key="Tab"):
    for _ in range(40):
        page.keyboard.press(key)
        focused = page.evaluate("""() => { const e = document.activeElement;
            return e.ariaLabel || document.querySelector(`label[for="${e.id}"]`)?.textContent || e.textContent; }""")
        if focused == label:
            ring = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert ring == "solid", f"{label} shows no focus"
            return
    raise AssertionError(f"{label} cannot be reached with {key}")


def test_keyboard_only(page):
    keys = page.keyboard
    expect(page.locator("#input")).to_be_focused()
    keys.type("stub one")
    keys.press("Shift+Enter")
    keys.type("second line")
    keys.press("Enter")
    answered(page)
    assert last_request()["messages"][0]["content"] == "stub one\nsecond line"
    expect(page.locator("#spoken")).to_contain_text("Answer")
    tab_to(page, "Retry: write another answer", "Shift+Tab")
    keys.press("Enter")
    answered(page)
    expect(page.locator("#input")).to_be_focused()
    tab_to(page, "Previous branch", "Shift+Tab")
    keys.press("Space")
    expect(page.locator(".branches")).to_contain_text("1/2")
    assert page.evaluate("() => document.activeElement.ariaLabel") == "Previous branch"
    tab_to(page, "Edit message", "Shift+Tab")
    keys.press("Enter")
    keys.press("Control+A")
    keys.type("stub slow")
    keys.press("Enter")
    expect(answers(page)).to_contain_text("word word")
    keys.type("typed meanwhile")
    keys.press("Enter")  # must neither send nor stop
    expect(page.locator("#notice")).to_contain_text("Press Escape")
    keys.press("Escape")
    answered(page)
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#input")).to_have_value("typed meanwhile")
    tab_to(page, "Settings", "Shift+Tab")
    keys.press("Enter")
    tab_to(page, "Max tokens")
    keys.type("7")
    keys.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    tab_to(page, "Your message")
    keys.press("Control+A")
    keys.type("stub last")
    keys.press("Enter")
    answered(page)
    assert last_request()["max_tokens"] == 7
    tab_to(page, "New", "Shift+Tab")
    keys.press("Enter")
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#input")).to_be_focused()
    tab_to(page, "Conversation", "Shift+Tab")
    keys.press("ArrowDown")
    keys.press("ArrowUp")
    expect(page.locator("#conversations")).to_be_focused()


def test_every_control_has_a_name(page):
    say(page, "stub hostile")
    answered(page)
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, select')]
        .filter((e) => !e.ariaLabel && !e.textContent.trim() && !document.querySelector(`label[for="${e.id}"]`)
          || (/INPUT|TEXTAREA|SELECT/.test(e.tagName) && !document.querySelector(`label[for="${e.id}"]`)))
        .map((e) => e.outerHTML)""")
    assert nameless == []
