"""`runtime bench report` and `--report`: one file that needs no network, its plots, and what is said where none can be drawn."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pagegraph.runtime.bench import page, runs
from pagegraph.runtime.cli import main
from tests.runtime.bench.fake_server import fake_server
from tests.runtime.bench.stored import LATENCY, STARTUP, THROUGHPUT, serve_figures

drawn = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="pip install 'pagegraph[bench]'")
VOID = ("meta", "link", "img", "br")


class Page(HTMLParser):
    """Every id, every address, every figure; and that elements are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.figures: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self._open.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.fetched += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        self.figures += [given["id"]] if tag == "figure" else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def stored(folder: Path, **given: dict[str, Any]) -> list[str]:
    for name, value in given.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return [str(folder / f"{name}.json") for name in given]


def report(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "report", *arguments])


@drawn
def test_a_page_of_all_kinds(tmp_path: Path) -> None:
    rates = {f"rate{rate}": serve_figures(rate) for rate in (1, 2, 8)}
    files = stored(tmp_path, **rates, throughput=THROUGHPUT, other=THROUGHPUT, latency=LATENCY, startup=STARTUP)
    output, folder = tmp_path / "new" / "r.html", tmp_path / "png"
    result = report(*files, "--output", str(output), "--png", str(folder))
    assert result.exit_code == 0, result.output
    found = Page(output.read_text())
    metrics = ("ttft", "tpot", "itl", "e2el")
    expected = {f"{what}-{metric}" for what in ("load", "distribution", "compare") for metric in metrics}
    expected |= {"load-throughput", "compare-throughput", "throughput-offline", "latency-batches", "startup"}
    expected |= {f"{what}-{number}" for what in ("timeline", "over-time") for number in (1, 2)}
    assert set(found.figures) == expected and len(found.ids) == len(set(found.ids))
    assert {path.stem for path in folder.iterdir()} == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    assert "Request rate configured (RPS)" in found.text and "Tokens a second, prompts too" in found.text


@drawn
def test_the_page_fetches_nothing_and_follows_the_theme(tmp_path: Path) -> None:
    (file,) = stored(tmp_path, one=serve_figures(2))
    output = tmp_path / "r.html"
    assert report(file, "--output", str(output)).exit_code == 0
    text = output.read_text()
    found = Page(text)
    assert all(address.startswith("#") and address[1:] in found.ids for address in found.fetched)
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/1999/xlink"}
    plots = text[text.index("<svg") :]
    assert not re.findall(r"(?:fill|stroke): #(?!000000)\w{6}", plots), "a colour that is no variable"
    for variable in set(re.findall(r"var\((--[\w-]+)\)", plots)):
        assert text.count(f"{variable}:") == 2, variable  # light and dark
    assert "Timeline and distributions need" not in found.text


@drawn
def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    found = [runs.of_figures(serve_figures(rate), f"r{rate}") for rate in (1, 4)]
    assert page.html(found) == page.html(found)


@drawn
def test_names_are_text_and_runs_without_detail_say_what_is_missing(tmp_path: Path) -> None:
    found = Page(page.html([runs.of_figures(serve_figures(2, "<b>&", detailed=False), "<b>&")]))
    assert found.figures == [] and "<b>&" in found.text
    assert "need --save-detailed, which <b>&\nwas run without" in found.text


@drawn
def test_ratios_are_to_the_first_run() -> None:
    (table,) = page._tables([runs.of_figures({**THROUGHPUT, "num_requests": n}, str(n)) for n in (4, 6)])
    assert table["rows"][0] == ("Requests", [("4", ""), ("6", "1.50 x")])


@drawn
def test_odd_runs_are_drawn(tmp_path: Path) -> None:
    """One request of one token; a figure of no values; a goodput of 0; two servers over their rates."""
    single = serve_figures(1, count=1)
    single |= {
        "itls": [[]],
        "output_lens": [1],
        "mean_itl_ms": None,
        "median_itl_ms": None,
        "p90_itl_ms": None,
        "p99_itl_ms": None,
    }
    page.html([runs.of_figures(single, "one")])
    page.html([runs.of_figures({**single, "request_rate": rate, "request_goodput": 0.0}, str(rate)) for rate in (1, 2)])
    both = [
        runs.of_figures(serve_figures(rate, label), f"{label}{rate}") for rate in (1, 2) for label in ("a server", "b")
    ]
    assert "load-ttft" in Page(page.html(both)).figures


@drawn
def test_a_bench_writes_its_own_page(tmp_path: Path) -> None:
    output = tmp_path / "r.html"
    with fake_server() as server:
        server.gap = 0.001
        flags = ["--num-prompts", "5", "--output-len", "4", "--report", str(output)]
        result = CliRunner().invoke(main, ["bench", "serve", "--base-url", server.url, *flags])
    assert result.exit_code == 0, result.output
    assert {"timeline-1", "distribution-ttft"} <= set(Page(output.read_text()).figures)


def test_what_is_missing_is_named_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = "plots need matplotlib, which is not installed: pip install 'pagegraph[bench]'"
    files = stored(tmp_path, one=THROUGHPUT)
    assert told in report(*files).output
    with fake_server() as server:
        flags = ["--base-url", server.url, "--report", str(tmp_path / "r.html")]
        assert told in CliRunner().invoke(main, ["bench", "serve", *flags]).output
        assert not server.bodies


@drawn
def test_files_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (file,) = stored(tmp_path, odd={"a": 1})
    assert "odd.json: is no file of runtime bench" in report(file).output
    assert "Missing argument" in report().output
