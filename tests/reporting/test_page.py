"""The page of a report: it is well-formed, complete, inert and needs no network."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from src.reporting.rows import summarise
from src.reporting.table import table, write
from src.runs.record import ExperimentEntry
from tests.made_up_runs import STUDY, run, with_untrained

VOID = {"meta", "br", "img", "link"}
HOSTILE = "<script>alert('&\"')</script>"


class Page(HTMLParser):
    """Parses a page as a browser does, and fails if its tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, len(self.texts)))
            self.texts.append([".".join(name for name, _ in self.open), ""])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, place in self.open:
            self.texts[place][1] += data

    def of(self, tag, within=""):
        return [text for path, text in self.texts if path.split(".")[-1] == tag and within in path]


def page_of(runs, folder, title="study"):
    rows, notes = summarise(runs)
    written = write(rows, notes, title, folder)
    assert folder / "results.html" in written
    return rows, Page((folder / "results.html").read_text())


def test_the_table_and_a_point_for_each_row_and_figure(tmp_path):
    rows, page = page_of([with_untrained(each, test_linear_top1=9.5) for each in STUDY], tmp_path)
    header, *body = table(rows)
    assert [name.replace("\N{NON-BREAKING HYPHEN}", "-") for name in page.of("th")] == header
    assert len(page.of("td")) == len(header) * len(body)
    told = page.of("title", "svg")
    assert len(told) == len(rows) - 1  # the untrained encoder is not drawn
    assert "NNCLR 4,096: test linear top-1 57.33 ± 0.33, 3 seeds" in told
    assert "<title>NNCLR 4,096: test linear top-1 57.33 ± 0.33, 3 seeds</title>" in (tmp_path / "plot.svg").read_text()


def test_many_variants_have_a_point_each_too(tmp_path):
    runs = [run("kmclr", 50, top1=40 + n, **{"optimizer.lr": str(n)}) for n in range(12)]
    rows, page = page_of(runs, tmp_path)
    assert len(rows) == 12
    assert len(set(page.of("title", "svg"))) == 12


def test_a_curve_tells_whose_it_is(tmp_path):
    runs = [replace(run("kmclr", 50, seed), directory=tmp_path / f"folder{seed}") for seed in range(2)]
    for each in runs:
        each.directory.mkdir()
        replace(each).save(each.directory)
        (each.directory / "metrics.jsonl").write_text('{"step": 9, "time": 0, "metrics": {"val/knn_top1": 41.5}}\n')
    _, page = page_of(runs, tmp_path / "out")
    assert "KMCLR 50: 41.50 at epoch 500" in page.of("title", "svg")
    (runs_line,) = [line for line in page.of("li") if line.startswith("KMCLR 50:")]
    assert runs_line == "KMCLR 50: folder0, folder1"


def test_all_text_is_inert(tmp_path):
    hostile = {"method.label": HOSTILE, "objective.name": HOSTILE, "data.name": HOSTILE, "method.colour": HOSTILE}
    runs = [run("kmclr", 50, name=HOSTILE, **hostile), run("kmclr", 50, name="left\"out'", status="KILLED")]
    runs += [run("kmclr", 50, seed=1, **(hostile | {"objective.name": '"'})), run("nnclr", 8, **hostile)]
    _, page = page_of(runs, tmp_path, title=HOSTILE)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert page.of("h1") == [HOSTILE]
    assert HOSTILE in "".join(page.of("td"))
    assert HOSTILE in "".join(page.of("title", "svg"))
    assert HOSTILE in "".join(page.of("li"))


@pytest.mark.parametrize("server", ["", "https://user:secret-word@mlflow.example/"])
def test_nothing_leads_out_of_the_page_but_the_links_to_the_runs(tmp_path, monkeypatch, server):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    runs = [
        replace(each, copies={"study": ExperimentEntry(f"r{n}", experiment_id="7")}) for n, each in enumerate(STUDY)
    ]
    _, page = page_of([*runs, run("nnclr", 8)], tmp_path)
    leading = [
        (tag, key, value)
        for tag, attributes in page.tags
        for key, value in attributes.items()
        if key in ("href", "src", "xlink:href", "srcset", "data", "action") and not value.startswith("#")
    ]
    assert {(tag, key) for tag, key, _ in leading} == {("a", "href")}
    home = "https://mlflow.example" if server else "http://127.0.0.1:5000"
    assert {value for _, _, value in leading} == {
        f"{home}/#/experiments/7/runs/r{n}?workflowType=machine_learning" for n in range(len(STUDY))
    }
    text = (tmp_path / "results.html").read_text()
    assert not re.search(r"@import|url\((?!#)", text)
    assert "secret-word" not in text
    assert any("mlflow ui" in each for each in page.of("p"))
