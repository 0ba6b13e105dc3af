"""Chromium on the pages for people: chat, dashboard and API, by hand and on a phone, and axe's opinion of them.

Debian's chromium, or the one that CHROMIUM names. What a small model will not say on request (tools, reasoning, markdown,
markup that attacks) a made-up stream says in its place.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from axe_playwright_python.sync_playwright import Axe
from cases import BASE_URL, case, main, note
from playwright.sync_api import ConsoleMessage, Page, Route, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SIZES = {"wide": (1100, 800), "phone": (390, 800)}
WAIT_MS = 60_000
MARKDOWN = """A **table**, `code` and a [link](https://example.com):

| a | b |
|---|---|
| 1 | 2 |

```python
def add(a, b):
    return a + b
```
<img src="x" onerror="window.attacked = 1"><script>window.attacked = 1</script><a href="javascript:window.attacked = 1">x</a>
"""
# Chromium reports attributes that the policy forbids also of markup that is parsed to be cleaned and is in no page; its target is
# then the document, and nothing was run or drawn.
REPORTS_VIOLATIONS = """addEventListener("securitypolicyviolation", (event) => {
  const onlyParsed = event.target === document && event.effectiveDirective.endsWith("-attr");
  if (!onlyParsed) console.error(`${event.effectiveDirective} forbids ${event.blockedURI}`);
});"""
USAGE = {
    "prompt_tokens": 51,
    "completion_tokens": 30,
    "total_tokens": 81,
    "prompt_tokens_details": {"cached_tokens": 48},
}


@contextmanager
def page(path: str = "/", size: str = "wide", scheme: str = "light") -> Iterator[Page]:
    """A page of a browser of its own, which has had no error in the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        width, height = SIZES[size]
        opened = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        opened.set_default_timeout(WAIT_MS)
        errors: list[str] = []
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("console", lambda message: errors.append(message.text) if _is_fault(message) else None)
        opened.add_init_script(REPORTS_VIOLATIONS)
        opened.goto(BASE_URL + path)
        opened.wait_for_function("() => document.getElementById('model').textContent")
        yield opened
        browser.close()
        assert not errors, errors


def _is_fault(message: ConsoleMessage) -> bool:
    """A request that fails is no fault of the page; what the policy forbids is, as REPORTS_VIOLATIONS tells it."""
    of_chromium = (
        "Failed to load resource",
        "Executing inline event handler violates",
        "Applying inline style violates",
    )
    return message.type == "error" and not message.text.startswith(of_chromium)


def set_tokens(opened: Page, tokens: int) -> None:
    opened.click("#settings summary")
    opened.fill("[name=max_tokens]", str(tokens))
    opened.fill("[name=temperature]", "0")
    opened.click("#settings summary")


def say(opened: Page, text: str) -> None:
    """Send a message and wait for the answer's end."""
    before = opened.locator(".figures").count()
    opened.fill("#input", text)
    opened.keyboard.press("Enter")
    opened.wait_for_function(f"() => document.querySelectorAll('.figures').length > {before}")


def answered_by(opened: Page, *deltas: dict, then: Callable[[dict], None] = lambda body: None) -> None:
    """Answer chats with these deltas."""
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas] + [{"choices": [], "usage": USAGE}]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    def answer(route: Route) -> None:
        then(json.loads(route.request.post_data or "{}"))
        route.fulfill(status=200, content_type="text/event-stream", body=stream)

    opened.route("**/v1/chat/completions", answer)


@case("plain")
def chat_keeps_its_history_and_uses_the_cache() -> None:
    with page() as opened:
        set_tokens(opened, 24)
        say(opened, "Name three colours.")
        say(opened, "And three more?")
        assert opened.locator(".message.user").count() == 2 and opened.locator(".answer").count() == 2
        assert "of it cached" in opened.locator(".figures").last.inner_text()
        opened.reload()
        opened.wait_for_selector(".answer")
        assert opened.locator(".answer").count() == 2
        opened.click("text=New chat")
        assert opened.locator(".message").count() == 0 and opened.locator("#empty").is_visible()


@case("plain")
def an_error_is_told_and_the_page_goes_on() -> None:
    with page() as opened:
        set_tokens(opened, 8)
        opened.route("**/v1/chat/completions", lambda route: route.abort())
        opened.fill("#input", "Hello")
        opened.keyboard.press("Enter")
        opened.wait_for_selector("#error:has-text('cannot be reached')")
        opened.unroute("**/v1/chat/completions")
        say(opened, "Hello again")
        assert not opened.locator("#error").is_visible()
        opened.click("#settings summary")
        opened.fill("[name=tools]", "[{")
        opened.fill("#input", "Hello")
        opened.press("#input", "Enter")
        opened.wait_for_selector("#error:has-text('Tools')")


@case("plain")
def what_was_not_answered_is_not_lost() -> None:
    with page() as opened:
        set_tokens(opened, 8)
        say(opened, "Hello")
        first = opened.locator(".answer").inner_text()
        opened.route("**/v1/chat/completions", lambda route: route.abort())
        opened.click("text=Regenerate")
        opened.wait_for_selector("#error:visible")
        assert opened.locator(".answer").inner_text() == first
        opened.fill("#input", "And now?")
        opened.press("#input", "Enter")
        opened.wait_for_selector("#send:visible")
        assert opened.input_value("#input") == "And now?" and opened.locator(".message.user").count() == 1
        opened.unroute("**/v1/chat/completions")
        answered_by(opened)
        opened.press("#input", "Enter")
        opened.wait_for_selector("#error:has-text('empty')")
        assert opened.input_value("#input") == "And now?"


@case("stream")
def a_message_is_kept_when_the_page_is_left_before_its_answer() -> None:
    with page() as opened:
        set_tokens(opened, 2000)
        opened.fill("#input", "Count from one to a thousand.")
        opened.keyboard.press("Enter")
        opened.wait_for_function("() => document.querySelector('.answer')?.textContent.length > 5")
        opened.reload()
        opened.wait_for_selector(".answer")
        assert "Count from one" in opened.locator(".message.user").inner_text()


@case("plain")
def tabs_keep_their_own_conversations() -> None:
    with page() as opened:
        other = opened.context.new_page()
        other.goto(BASE_URL)
        for tab, text in ((opened, "Here"), (other, "There")):
            answered_by(tab, {"content": text})
            say(tab, text)
        opened.reload()
        assert opened.locator(".message.user .body").all_inner_texts() == ["Here"]
        third = opened.context.new_page()
        third.goto(BASE_URL)
        third.wait_for_selector(".message")


@case("plain")
def what_is_kept_and_is_none_of_ours_is_passed_over() -> None:
    with page() as opened:
        for kept in ("{", "5", "null", '{"messages": 5}', '{"messages": [null]}', '{"messages": [{"role": "user"}]}'):
            opened.evaluate("(kept) => { onpagehide = () => localStorage.setItem('pagegraph.chat', kept); }", kept)
            opened.evaluate("() => addEventListener('pagehide', () => sessionStorage.clear())")
            opened.reload()
            opened.wait_for_function("() => document.getElementById('model').textContent")
            assert opened.locator("#empty").is_visible(), kept


@case("plain")
def a_key_that_cannot_be_sent_is_told() -> None:
    with page() as opened:
        opened.click("#settings summary")
        opened.fill("[name=key]", "\N{SNOWMAN}")
        opened.fill("#input", "Hello")
        opened.press("#input", "Enter")
        opened.wait_for_selector("#error:has-text('API key')")


@case("plain")
def a_model_that_is_gone_is_looked_up_anew() -> None:
    bodies: list[dict] = []
    with page() as opened:
        gone = {"error": {"message": "no such model"}}
        opened.route("**/v1/chat/completions", lambda route: route.fulfill(status=404, json=gone))
        opened.fill("#input", "Hello")
        opened.press("#input", "Enter")
        opened.wait_for_selector("#error:has-text('no such model')")
        opened.unroute("**/v1/chat/completions")
        opened.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "another"}]}))
        answered_by(opened, {"content": "Hello."}, then=bodies.append)
        say(opened, "Hello")
        assert bodies[0]["model"] == "another" and opened.locator("#model").inner_text() == "another"


@case("stream")
def an_answer_streams_and_can_be_stopped() -> None:
    with page() as opened:
        set_tokens(opened, 2000)
        opened.fill("#input", "Count from one to a thousand.")
        opened.keyboard.press("Enter")
        opened.wait_for_function("() => document.querySelector('.answer')?.textContent.length > 5")
        first = len(opened.locator(".answer").inner_text())
        opened.wait_for_function(f"() => document.querySelector('.answer').textContent.length > {first + 10}")
        assert opened.locator("#stop").is_visible()
        opened.keyboard.press("Escape")
        opened.wait_for_selector("#send:visible")
        assert opened.locator(".figures").inner_text() == "stopped"


@case("stream")
def messages_are_edited_and_answers_made_again() -> None:
    with page() as opened:
        set_tokens(opened, 6)
        say(opened, "First")
        opened.click("text=Regenerate")
        opened.wait_for_selector("#send:visible")
        assert opened.locator(".answer").count() == 1
        opened.press("#input", "ArrowUp")
        assert opened.input_value("#input") == "First" and opened.locator(".message").count() == 0
        say(opened, "Second")
        assert opened.locator(".message.user .body").inner_text() == "Second"


@case("tools")
def calls_are_folded_and_take_a_result() -> None:
    bodies: list[dict] = []
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": '}}
    rest = {"index": 0, "function": {"arguments": '"Paris"}'}}
    with page() as opened:
        answered_by(opened, {"tool_calls": [call]}, {"tool_calls": [rest]}, then=bodies.append)
        say(opened, "What is the weather?")
        assert opened.locator("details:has-text('Calls weather') .body").inner_text() == '{"city": "Paris"}'
        opened.unroute("**/v1/chat/completions")
        answered_by(opened, {"content": "It is sunny."}, then=bodies.append)
        opened.fill("[aria-label='Result of weather']", "sunny")
        opened.click("text=Send result")
        opened.wait_for_selector("text=It is sunny.")
        question, answer, result = bodies[1]["messages"]
        assert answer["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
        assert result == {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


@case("tools")
def each_of_several_calls_takes_a_result() -> None:
    bodies: list[dict] = []
    calls = [
        {"index": index, "id": f"call_{index}", "function": {"name": name, "arguments": "{}"}}
        for index, name in enumerate(("weather", "time"))
    ]
    with page() as opened:
        answered_by(opened, {"tool_calls": calls}, then=bodies.append)
        say(opened, "What is the weather, and the time?")
        opened.unroute("**/v1/chat/completions")
        answered_by(opened, {"content": "It is late."}, then=bodies.append)
        for name in ("time", "weather"):
            opened.fill(f"[aria-label='Result of {name}']", f"the {name}")
            opened.locator(f"details:has([aria-label='Result of {name}']) button").click()
        opened.wait_for_selector("text=It is late.")
        results = [(one["tool_call_id"], one["content"]) for one in bodies[1]["messages"] if one["role"] == "tool"]
        assert results == [("call_1", "the time"), ("call_0", "the weather")]


@case("plain")
def markdown_is_drawn_and_markup_does_no_harm() -> None:
    with page() as opened:
        answered_by(opened, {"reasoning_content": "Let me think."}, {"content": MARKDOWN})
        say(opened, "Show me.")
        answer = opened.locator(".answer")
        assert answer.locator("table td").all_inner_texts() == ["1", "2"]
        assert "def add(a, b):" in answer.locator("pre").inner_text()
        assert answer.locator("a").first.get_attribute("rel") == "noopener noreferrer"
        assert answer.locator("img, script, [onerror], a[href^=javascript]").count() == 0
        assert opened.evaluate("() => window.attacked") is None
        reasoning = opened.locator("details:has-text('Reasoning')").last
        assert reasoning.get_attribute("open") is None
        assert "30 tokens" in opened.locator(".figures").inner_text()


@case("plain")
def the_dashboard_draws_what_runs() -> None:
    with page() as opened:
        set_tokens(opened, 20)
        dashboard = opened.context.new_page()
        dashboard.goto(f"{BASE_URL}/dashboard")
        dashboard.wait_for_selector(".card .now:has-text('0')")
        say(opened, "Hello")
        cards = dashboard.locator(".card:visible")
        dashboard.wait_for_function(
            "() => [...document.querySelectorAll('.card')].some((one) => /(length|stop) 1/.test(one.textContent))"
        )
        texts = {text.split("\n")[0]: text for text in cards.all_inner_texts()}
        assert " ms" in texts["Time to first token, median"] or " s" in texts["Time to first token, median"], texts
        assert len(texts) >= 8, texts
        row = dashboard.locator("#rows tr").first.inner_text().split("\t")
        assert len(row) == 10 and row[1] in ("stop", "length"), row


@case("plain")
def pages_work_behind_a_prefix_of_a_proxy() -> None:
    def forward(route: Route) -> None:
        route.fulfill(response=route.fetch(url=route.request.url.replace("/llm/", "/", 1)))

    with page() as opened:
        opened.route(f"{BASE_URL}/**", lambda route: route.fulfill(status=404))
        opened.route(f"{BASE_URL}/llm/**", forward)
        opened.goto(f"{BASE_URL}/llm/")
        set_tokens(opened, 4)
        say(opened, "Hello")
        opened.click("nav >> text=Dashboard")
        opened.wait_for_selector(".card:visible")
        opened.click("nav >> text=API")
        opened.click("summary:has-text('/v1/models')")
        opened.locator("details[open] button").click()
        opened.wait_for_selector("details[open] pre:has-text('200')")


@case("plain")
def axe_finds_nothing_and_a_phone_scrolls_one_way() -> None:
    for scheme in ("light", "dark"):
        for size in SIZES:
            with page(size=size, scheme=scheme) as opened:
                answered_by(opened, {"reasoning_content": "Let me think."}, {"content": MARKDOWN})
                say(opened, "Show me.")
                opened.click("#settings summary")
                _accepted(opened)
                opened.goto(f"{BASE_URL}/dashboard")
                opened.wait_for_selector(".card:visible")
                _accepted(opened)
                opened.goto(f"{BASE_URL}/docs")
                opened.click("summary:has-text('/v1/chat/completions')")
                opened.click("summary:has-text('/v1/models/{name}')")
                _accepted(opened)


def _accepted(opened: Page) -> None:
    found = Axe().run(opened).response["violations"]
    assert not found, [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]
    assert opened.evaluate("() => document.documentElement.scrollWidth <= document.documentElement.clientWidth")


if __name__ == "__main__":
    if not os.access(CHROMIUM, os.X_OK):
        sys.exit(f"{CHROMIUM} cannot be run: apt-get install chromium, or name another one in CHROMIUM")
    note("the pages /, /dashboard and /docs, Debian's chromium; axe-core finds nothing")
    main("playwright", "axe-playwright-python")
