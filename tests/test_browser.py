"""MLflow's own pages, in Chromium: what somebody who opens a sweep's link sees.

The pages are read through the marks that they carry for tests (``data-testid``, ``data-component-id``) and through
Plotly's data, so another version of MLflow may need other names here.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from src.config.identity import LOG_SIZE
from src.config.names import COLOURS
from src.config.schema import Tracking
from src.reporting import mlflow_charts
from src.reporting.mlflow_charts import CHARTED, COURSE, SavedView, sweep_view
from src.reporting.rows import RANKING, RIGHT_POSITIVES, summarise
from src.runs.mlflow_store import prepare
from src.runs.record import TAG_COLOUR, TAG_NOTE, Record
from src.runs.tracker import Tracker

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]  # one server, one browser

SIZE = "support_set_size"
SIZES = {"simclr": [0], "nnclr": [1024, 98304], "kmclr": [50, 200, 400]}
OWN_SIZE = {"nnclr": "queue_size", "kmclr": "k"}
SEEDS = (0, 1)
WIDTH, HEIGHT = 1600, 900
PATIENCE = 300  # seconds that a page may take to show what it should

# Each chart with its title, the titles of its axes, what Plotly was given, and the points that it drew.
CHARTS = """
return [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')].map(card => ({
    title: card.querySelector('h4').textContent,
    x: card.querySelector('.xtitle')?.textContent,
    y: card.querySelector('.ytitle')?.textContent,
    traces: card.querySelector('.js-plotly-plot')?.data ?? [],
    drawn: card.querySelectorAll('.points path').length,
    axes: [...card.querySelectorAll('.dimension .label')].map(label => label.textContent),
}))
"""


@dataclass(frozen=True)
class Job:
    name: str
    size: int
    validation: float
    accuracy: float
    colour: str | None


@dataclass(frozen=True)
class Sweep:
    experiment: str
    run_id: str
    name: str
    children: set[str]
    jobs: dict[str, Job]  # by run id, the children that have an accuracy
    view: SavedView


def make_sweep(folder: Path) -> None:
    """Log a sweep with made-up figures, of three methods and two seeds, and a run that is not one of its jobs."""
    config = Tracking("mlflow", "support-sets", 10)
    sweep = Tracker(folder / "sweep", config, {}, {"sweep_id": "0a1b2c3d"})
    common = {"data.name": "cifar100", "backbone.name": "resnet18", "epochs": 10, "support_bytes": 0}
    directories = []
    Tracker(folder / "stranger", config, {SIZE: 7}, {}).close("FINISHED")
    for method, sizes in SIZES.items():
        for size, seed in ((size, seed) for size in sizes for seed in SEEDS):
            name = f"{method}-{size}-{seed}"
            tags = {"mlflow.parentRunId": sweep.run_id, TAG_COLOUR: COLOURS[method]}
            directories.append(folder / name)
            own = {"method.name": method, SIZE: size, "seed": seed} | ({OWN_SIZE[method]: size} if size else {})
            job = Tracker(directories[-1], config, common | own, tags)
            top1 = 50 + math.log10(1 + size) + seed / 3
            for epoch in range(10):
                job.log({COURSE: (top1 - 5) * (1 - math.exp(-1 - epoch / 3))}, epoch)
            last = {"val/linear_top1": 99 - top1, "test/linear_top1": top1, "test/linear_top5": top1 + 25}
            job.log(last | {RIGHT_POSITIVES: 10}, 10)
            job.close("FINISHED")
    rows, _ = summarise([Record.load(directory) for directory in directories])
    sweep.record.tags[TAG_NOTE] = mlflow_charts.describe_sweep("sweep", rows)
    mlflow_charts.publish(sweep)
    sweep.close("FINISHED")


def newest_sweep() -> Sweep:
    """The newest sweep of the store in the current folder, read without the pages."""
    client = prepare()
    tagged = [
        (json.loads(value)["createdAt"], key.removeprefix("mlflow.sharedViewState."), experiment)
        for experiment in client.search_experiments()
        for key, value in experiment.tags.items()
        if key.startswith("mlflow.sharedViewState.")
    ]
    created, run_id, experiment = max(tagged, key=lambda found: found[:2])
    name = client.get_run(run_id).info.run_name
    children = [
        run
        for run in client.search_runs([experiment.experiment_id])
        if run.data.tags.get("mlflow.parentRunId") == run_id
    ]
    jobs = {
        run.info.run_id: Job(
            run.info.run_name,
            int(run.data.params[SIZE]),
            run.data.metrics["val/linear_top1"],
            run.data.metrics["test/linear_top1"],
            run.data.tags.get(TAG_COLOUR),
        )
        for run in children
        if "test/linear_top1" in run.data.metrics
    }
    view = sweep_view(experiment.experiment_id, run_id, name, created)
    return Sweep(experiment.name, run_id, name, {run.info.run_id for run in children}, jobs, view)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a store that has a sweep; it is the current folder."""
    place = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        make_sweep(place)
        yield place


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    """``mlflow ui``, started as a user starts it."""
    log = tmp_path_factory.mktemp("ui") / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "mlflow", "ui", "--port", "0", "--workers", "1"]  # four take seconds to start
        fewer = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # fewer processes of MLflow
        server = subprocess.Popen(command, cwd=folder, env=fewer, stdout=file, stderr=file, start_new_session=True)
    try:
        yield wait_for_server(server, log)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its workers too
        server.wait(600)


def wait_for_server(server: subprocess.Popen, log: Path) -> str:
    """Wait until the server answers; returns its address, whose port is any that was free."""
    for _ in range(2 * PATIENCE):
        if server.poll() is not None:
            pytest.fail(f"mlflow ui ended with status {server.returncode}: {log.read_text()[-2000:]}")
        if said := re.search(r"running on (http://\S+)", log.read_text()):
            return said[1]
        time.sleep(0.5)
    pytest.fail(f"mlflow ui does not answer: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: run `make setup`")
    browser, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and chromedriver):
        pytest.skip("no Chromium with its driver: on Debian, apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    profile = tmp_path_factory.mktemp("profile")
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run")
    bare = ("headless", "hide-scrollbars", "no-sandbox", "disable-gpu", "disable-quic")
    mouse = "blink-settings=primaryHoverType=2,availableHoverTypes=2"  # without one, Plotly's buttons cover its points
    size = f"window-size={WIDTH},{HEIGHT}"  # of pages that links open; the first page's is set exactly below
    for flag in (*bare, *quiet, mouse, size, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    screen = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def sweep(folder):
    return newest_sweep()


@pytest.fixture(scope="module")
def browser(driver, address):
    """The browser, in which the panel that greets a newcomer over a quarter of the page has been closed."""
    driver.get(address)
    click(driver, "[data-component-id='mlflow.assistant.chat_panel.close']")
    return driver


@pytest.fixture(scope="module")
def page(browser, address, sweep):
    """The page behind the sweep's link. Only the last test changes it."""
    browser.get("about:blank")
    browser.get(f"{address}/{sweep.view.path}")
    click(browser, "[data-component-id='mlflow.experiment_page.shared_view.dismiss']")
    return browser


def wait_until(driver, condition, message):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, PATIENCE).until(condition, message)


def click(driver, selector: str) -> None:
    """Click without a pointer, which would hover over the page. Menus open when the button is pressed."""
    press = """
        const target = document.querySelector(arguments[0]);
        const tell = type => target.dispatchEvent(new PointerEvent(type, {bubbles: true, cancelable: true}));
        return target !== null && ['pointerdown', 'click'].map(tell).length > 0;
    """
    wait_until(driver, lambda driver: driver.execute_script(press, selector), f"the page has no {selector}")


def rows(driver) -> list[str]:
    """The run ids in the list, from top to bottom."""
    found = driver.execute_script(
        "return [...document.querySelectorAll('.ag-pinned-left-cols-container [row-id]')]"
        ".map(row => [Number(row.getAttribute('row-index')), row.getAttribute('row-id')])"
    )
    return [run_id for _, run_id in sorted(found)]


def charts(driver) -> dict[str, dict]:
    return {chart["title"]: chart for chart in driver.execute_script(CHARTS)}


def scatter(driver, jobs: int) -> dict:
    """The chart of size against accuracy, once it shows as many points as there are jobs."""
    title = f"{LOG_SIZE} vs. test/linear_top1"
    wait_until(
        driver,
        lambda driver: charts(driver).get(title, {}).get("drawn") == jobs,
        f"the chart {title!r} does not show {jobs} points",
    )
    return charts(driver)[title]


def visit(driver, text: str) -> None:
    """Click a link as a person does: it has to be in sight, with nothing over it."""
    from selenium.webdriver.common.by import By

    condition = lambda driver: driver.find_elements(By.PARTIAL_LINK_TEXT, text)  # noqa: E731
    wait_until(driver, condition, f"the page has no link {text!r}")[0].click()


def test_a_newcomer_comes_from_the_first_page_to_the_charts(browser, address, sweep):
    from selenium.webdriver.common.by import By

    browser.get("about:blank")
    browser.get(address)
    wait_until(browser, lambda page: mlflow_charts.OPENING in page.find_element(By.TAG_NAME, "body").text, "no text")
    visit(browser, sweep.experiment)
    greeting = "//button[normalize-space()='Got it']"  # in the way on a first visit
    wait_until(browser, lambda page: page.find_elements(By.XPATH, greeting), "no greeting")[0].click()
    first, windows = browser.current_window_handle, set(browser.window_handles)
    visit(browser, f"Charts of the newest sweep, {sweep.name}")
    try:
        wait_until(browser, lambda page: set(page.window_handles) - windows, "no page opens")
        browser.switch_to.window((set(browser.window_handles) - windows).pop())
        assert {run_id for run_id, _ in scatter(browser, len(sweep.jobs))["traces"][0]["customdata"]} == set(sweep.jobs)
        assert sweep.view.path in browser.current_url
    finally:
        for window in set(browser.window_handles) - windows:
            browser.switch_to.window(window)
            browser.close()
        browser.switch_to.window(first)


def test_the_sweep_is_described_by_its_table(browser, address, sweep):
    experiment = sweep.view.path.split("/")[2]
    browser.get(f"{address}/#/experiments/{experiment}/runs/{sweep.run_id}")
    cells = "return [...document.querySelectorAll('td')].map(cell => cell.textContent)"
    wait_until(browser, lambda page: "KMCLR" in page.execute_script(cells), "the run's page has no table")


def test_the_link_opens_on_charts_of_every_job(page, sweep):
    chart = scatter(page, len(sweep.jobs))
    assert (chart["x"], chart["y"]) == (LOG_SIZE, "test/linear_top1")
    (trace,) = chart["traces"]
    points = zip(trace["customdata"], trace["x"], trace["y"], trace["marker"]["color"], strict=True)
    found = {run_id: (name, float(x), y, colour) for (run_id, name), x, y, colour in points}
    assert found.keys() == sweep.jobs.keys()
    for run_id, job in sweep.jobs.items():
        assert found[run_id][:3] == (job.name, round(math.log10(max(1, job.size)), 3), job.accuracy)
        assert job.colour in (None, found[run_id][3])

    wait_until(page, rows, "the list is empty")
    listed = [sweep.jobs[run_id].validation for run_id in rows(page) if run_id in sweep.jobs]
    best_first = sorted((job.validation for job in sweep.jobs.values()), reverse=True)
    assert listed
    assert listed == best_first[: len(listed)], "as much of the list as fits"
    assert sweep.run_id not in rows(page)


def test_the_other_charts_show_too(page, sweep):
    scatter(page, len(sweep.jobs))
    second, course = f"{LOG_SIZE} vs. {RIGHT_POSITIVES}", COURSE
    wait_until(page, lambda page: charts(page)["Parallel Coordinates"]["axes"], "no parallel coordinates")
    wait_until(page, lambda page: charts(page)[course]["drawn"], "no curves")
    sections = "return [...document.querySelectorAll('[data-testid$=section-header]')].map(each => each.textContent)"
    assert page.execute_script(sections)[0].startswith("Support-set size and accuracy")
    shown = charts(page)
    assert list(shown) == [f"{LOG_SIZE} vs. {figure}" for figure in CHARTED] + ["Parallel Coordinates", course]
    shortened = "suppor..._log10"  # MLflow has no room for the whole name
    assert shown["Parallel Coordinates"]["axes"] == [shortened, COURSE, RANKING, "test/linear_top1"]
    assert shown[second]["drawn"] == len(sweep.jobs)
    assert {trace["name"] for trace in shown[course]["traces"]} == {job.name for job in sweep.jobs.values()}


def test_the_view_is_listed_by_name(page, sweep):
    trigger = "return document.querySelector('[data-testid=saved-views-trigger]')?.textContent"
    wait_until(page, lambda page: page.execute_script(trigger), "the page has no list of saved views")
    assert page.execute_script(trigger) == sweep.name


def test_the_jobs_nest_under_their_sweep(page, sweep):
    scatter(page, len(sweep.jobs))
    click(page, "[data-testid='sort-select-dropdown']")
    click(page, "[data-testid='sort-select-Created']")
    wait_until(page, lambda page: rows(page) == [sweep.run_id], "the list is not the sweep's run alone, collapsed")

    click(page, f"[row-id='{sweep.run_id}'] button[data-component-id*='runnamecellrenderer']")
    family = {sweep.run_id, *sweep.children}
    wait_until(page, lambda page: set(rows(page)) == family, "the sweep's run does not expand to its jobs")
    assert rows(page)[0] == sweep.run_id
    scatter(page, len(sweep.jobs))
