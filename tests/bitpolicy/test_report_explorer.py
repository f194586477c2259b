"""The report's section "Explore sizes": its data, and the page in a real browser, which is skipped without one."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Policy
from bitpolicy.report.document import make_report
from bitpolicy.report.explorer import POINTS, Measured, _format_records, explorer
from bitpolicy.report.inputs import Probed
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.workflow.compare import pairs_in
from bitpolicy.workflow.curve import points, quick_points

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def probed(finished: Any) -> Probed:
    return Probed.load(finished.folder)


@pytest.fixture
def folder(finished: Any, tmp_path: Path) -> Path:
    """A copy of the search without its checkpoint and its probe's records."""
    return shutil.copytree(finished.folder, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint", "work"))


@pytest.fixture(scope="module")
def data(finished: Any) -> dict[str, Any]:
    return data_in(finished.folder)


def data_in(folder: Path) -> dict[str, Any]:
    """The JSON in the section on `folder`."""
    body = explorer(Probed.load(folder), folder).body
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', body, re.DOTALL)
    assert "<" not in text
    return json.loads(text)


def formats_at(data: dict[str, Any], point: int) -> dict[str, str]:
    """Layer name -> name of its format at a point of the page."""
    found = [data["choices"][index]["format"] for index in data["points"][point]["choices"]]
    return {layer["name"]: data["formats"][format]["name"] for layer, format in zip(data["layers"], found, strict=True)}


# The data


def test_the_points_are_the_exact_solutions_and_the_policy(data: dict[str, Any], probed: Probed) -> None:
    sizes = [point["bytes"] for point in data["points"]]
    assert sizes == sorted(sizes)
    assert POINTS / 2 < len(sizes) <= POINTS + 1
    account, formats = probed.account, (*probed.table.formats, FP16)
    problem = Problem(probed.layers, formats, account, table=probed.table, budget=account.reference)
    assert (sizes[0], sizes[-1]) == (problem.smallest, account.reference)
    for place in range(0, len(sizes), 5):
        chosen = {name: format_named(format) for name, format in formats_at(data, place).items()}
        assert account.total(chosen) == sizes[place]
        if place != data["own"]:
            assert data["points"][place]["error"] == pytest.approx(problem.solve(budget=sizes[place]).error, rel=1e-3)
    assert probed.policy is not None
    resolved = probed.policy.resolve(layer.name for layer in probed.layers)
    assert formats_at(data, data["own"]) == {name: choice.format.name for name, choice in resolved.items()}


def large(layers: int) -> Problem:
    """Layers of one shape, with errors spread over four decades."""
    inventory = [Layer(f"layer.{i}", "Linear", (64, 64), False, "conv", "early") for i in range(layers)]
    account = ByteAccount(torch.float16, {one.name: one.shape for one in inventory}, 1000, 4096 * layers)
    ten = 10 ** (-9 + 4 * torch.rand(layers, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    error, formats = ten * torch.tensor([1, 0.01]), (format_named("int4"), format_named("int8"))
    table = SensitivityTable("adjoint", tuple(account.shapes), formats, error, torch.zeros_like(error).bool())
    return Problem(inventory, (*formats, FP16), account, table=table, budget=account.reference)


@pytest.mark.parametrize("layers", [20, 150])
def test_quick_points_are_exact_for_their_own_bytes(layers: int) -> None:
    problem = large(layers)
    quick = quick_points(problem, problem.account, 20)
    solved = points(problem, problem.account, 20)
    assert abs(len(quick) - len(solved)) <= 1
    for point in quick:
        assert point.error == pytest.approx(problem.solve(budget=point.nbytes).error, rel=1e-3)
    nearest = [min(abs(point.nbytes - other.nbytes) for other in solved) for point in quick]
    assert max(nearest) < 0.02 * problem.account.reference


def test_a_layer_has_its_bytes_and_error_in_every_format(data: dict[str, Any], probed: Probed) -> None:
    places = {layer.name: i for i, layer in enumerate(probed.layers)}
    assert {layer["name"] for layer in data["layers"]} == set(places)
    for layer in data["layers"]:
        for format, nbytes, error in zip(data["formats"], layer["bytes"], layer["error"], strict=True):
            found = format_named(format["name"])
            assert nbytes == probed.account.layer(layer["name"], found)
            assert error == probed.table.score(places[layer["name"]], found)


def test_psnr_falls_by_the_decibels_that_the_error_rises(data: dict[str, Any], probed: Probed) -> None:
    own = data["points"][data["own"]]
    assert probed.policy is not None
    assert probed.policy.result is not None
    assert own["psnr"] == probed.policy.result.psnr_db
    assert Measured(40.0, 1e-4, "").estimate(1e-3) == pytest.approx(30.0)
    assert Measured(40.0, 1e-4, "").estimate(0.0) is None
    for point in data["points"]:
        if point["error"]:
            lost = 10 * math.log10(point["error"] / own["error"])
            assert point["psnr"] == pytest.approx(own["psnr"] - lost)


def test_without_a_measured_policy_the_frontier_is_extrapolated_from(folder: Path) -> None:
    policy = Policy.load(folder / "policy.yaml")
    assert policy.result is not None
    unmeasured = policy.result.model_copy(update={"psnr_db": None})
    policy.model_copy(update={"result": unmeasured}).save(folder / "policy.yaml")
    assert data_in(folder)["measured"] is None
    (folder / "frontier").mkdir(exist_ok=True)
    path = folder / "frontier" / "frontier.csv"
    path.write_text("policy,bytes,predicted_error,psnr_db\na.yaml,5,1e-3,31\nb.yaml,9,1e-4,41.5\nc.yaml,9,,\n")
    found = data_in(folder)
    assert "b.yaml" in found["measured"]
    psnr = [point["psnr"] + 10 * math.log10(point["error"]) for point in found["points"] if point["error"]]
    assert psnr == pytest.approx([41.5 - 40] * len(psnr))
    path.write_text("policy,bytes\na.yaml,5\n")
    with pytest.raises(BitPolicyError, match=r"cannot read .*frontier\.csv"):
        data_in(folder)


def test_a_probes_folder_has_points_and_no_policy_to_download(folder: Path) -> None:
    for name in ("policy.yaml", "result.json", "compare.png"):
        (folder / name).unlink()
    found = data_in(folder)
    assert (found["own"], found["header"], found["measured"], found["pairs"]) == (None, None, None, [])
    assert len(found["points"]) > POINTS / 2


def test_formats_of_one_width_differ_by_letter_and_stripes() -> None:
    records = _format_records([format_named(name) for name in ("int4", "int8", "fp8")] + [FP16])
    assert [record["letter"] for record in records] == ["4", "8", "8b", "16"]
    assert records[1]["color"] == records[2]["color"] != records[0]["color"]
    assert [record["striped"] for record in records] == [0, 0, 1, 0]


def test_pairs_are_cut_from_the_picture(finished: Any) -> None:
    sheet = Image.open(finished.folder / "compare.png").convert("RGB")
    pairs = pairs_in(finished.folder / "compare.png")
    assert len(pairs) == 8
    corner = sheet.width - 160 - 12, 32
    for picture, down in zip(pairs[-1], (0, 172), strict=True):
        box = (corner[0], corner[1] + down, corner[0] + 160, corner[1] + down + 160)
        assert ImageChops.difference(picture, sheet.crop(box)).getbbox() is None
    assert sheet.crop((sheet.width - 12, 0, *sheet.size)).getcolors() == [(12 * sheet.height, (255, 255, 255))]


def test_a_picture_of_another_kind_has_no_pairs(tmp_path: Path) -> None:
    Image.new("RGB", (500, 333)).save(tmp_path / "compare.png")
    assert pairs_in(tmp_path / "compare.png") == []
    (tmp_path / "compare.png").write_text("no picture")
    with pytest.raises(BitPolicyError, match=r"cannot read .*compare\.png"):
        pairs_in(tmp_path / "compare.png")


# The page in a browser


@dataclass(frozen=True)
class Browser:
    """A headless Chromium that shows the report on a search."""

    driver: Any
    downloads: Path

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", f".explorer {selector}")

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll('.explorer ' + arguments[0])].map(e => e.textContent)"
        return self.run(script, selector)

    def column(self, name: str) -> list[str]:
        """The cells of the table in one column."""
        place = self.texts("thead th").index(name) + 1
        return self.texts(f".layers tbody td:nth-child({place})")

    def sort(self, name: str) -> None:
        self.find(f".layers thead th:nth-child({self.texts('thead th').index(name) + 1}) button").click()


@pytest.fixture(scope="module")
def opened(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no Chromium with a driver")
    here = tmp_path_factory.mktemp("browser")
    page = here / "report.html"
    make_report(finished.folder).save(page)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(here)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(page.as_uri())
        yield Browser(driver, here)
    finally:
        driver.quit()


@pytest.fixture
def browser(opened: Browser) -> Iterator[Browser]:
    """The page as it opens; whatever it did, it has asked for nothing and logged nothing afterwards."""
    opened.driver.refresh()
    yield opened
    assert opened.driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert {url for url in asked if url.startswith("file:")} == {opened.driver.current_url}


def test_the_slider_moves_through_the_points(browser: Browser, data: dict[str, Any]) -> None:
    start = browser.run("return bitpolicy.point()")
    assert start == data["own"]
    assert "This is the policy that the folder holds" in browser.find(".verdict").text
    assert "measured PSNR" in browser.find(".facts").text
    browser.find(".size input").send_keys("\ue014")  # arrow right
    assert browser.run("return bitpolicy.point()") == start + 1
    facts = browser.find(".facts").text
    assert f"{data['points'][start + 1]['bytes']:,} bytes" in facts
    assert "estimated PSNR" in facts
    browser.find(".size input").send_keys("\ue010")  # end
    assert browser.run("return bitpolicy.point()") == len(data["points"]) - 1
    assert "Nothing is lost" in browser.find(".verdict").text


def test_the_map_has_the_colours_of_the_point(browser: Browser, data: dict[str, Any]) -> None:
    colors = {format["name"]: format["color"] for format in data["formats"]}
    script = "return [...document.querySelectorAll('.cell')].map(e => getComputedStyle(e).backgroundColor)"
    browser.run("document.head.append(Object.assign(document.createElement('style'), "
                "{textContent: '.explorer .cell { transition: none }'}))")  # fmt: skip
    shown = []
    for point in (0, len(data["points"]) // 2, len(data["points"]) - 1):
        browser.run("bitpolicy.go(arguments[0])", point)
        expected = [tuple(bytes.fromhex(colors[name][1:])) for name in formats_at(data, point).values()]
        shown.append(browser.run(script))
        assert [tuple(map(int, re.findall(r"\d+", color))) for color in shown[-1]] == expected
    assert shown[0] != shown[1] != shown[2]


def test_a_cell_in_focus_shows_its_layer(browser: Browser, data: dict[str, Any]) -> None:
    assert not browser.find(".tip").is_displayed()
    browser.run("document.querySelector('.cell').focus()")
    browser.find(".cell").send_keys("\ue014")
    layer = data["layers"][1]
    tip = browser.find(".tip").text
    for text in (layer["name"], layer["role"], layer["shape"], f"{layer['parameters']:,} parameters"):
        assert text in tip
    for nbytes in layer["bytes"]:
        assert f"{nbytes:,}" in tip


def test_the_table_is_sorted_by_every_column(browser: Browser, data: dict[str, Any]) -> None:
    for name in browser.texts("thead th"):
        browser.sort(name)
        once = browser.column(name)
        browser.sort(name)
        again = browser.column(name)
        assert sorted(once) == sorted(again)
        assert again != once or len(set(once)) == 1
    by_name = {layer["name"]: layer for layer in data["layers"]}
    browser.sort("parameters")
    assert [by_name[name]["parameters"] for name in browser.column("layer")] == sorted(
        (layer["parameters"] for layer in data["layers"]), reverse=True
    )


def test_the_table_is_filtered_by_text_and_role(browser: Browser, data: dict[str, Any]) -> None:
    role = data["layers"][-2]["role"]
    browser.find(".filters input").send_keys("UP_blocks")
    names = [layer["name"] for layer in data["layers"] if "up_blocks" in layer["name"]]
    assert browser.column("layer") == names
    browser.find(f".filters option[value='{role}']").click()
    both = [layer["name"] for layer in data["layers"] if "up_blocks" in layer["name"] and layer["role"] == role]
    assert browser.column("layer") == both
    assert f"{len(both)} of {len(data['layers'])} layers" in browser.find(".filters").text


def test_every_point_downloads_as_a_policy_with_its_choices(
    browser: Browser, data: dict[str, Any], probed: Probed, tmp_path: Path
) -> None:
    names = [layer.name for layer in probed.layers]
    for place, point in enumerate(data["points"]):
        browser.run("bitpolicy.go(arguments[0])", place)
        (tmp_path / "policy.yaml").write_text(browser.run("return bitpolicy.policyText()"))
        policy = Policy.load(tmp_path / "policy.yaml")
        choices = policy.resolve(names)
        assert {name: choice.format.name for name, choice in choices.items()} == formats_at(data, place)
        for i, name in enumerate(names):
            assert choices[name] == (
                probed.table.choice(i, choices[name].format) if place != data["own"] else own_choice(probed, name)
            )
        assert policy.result is not None
        assert policy.result.policy_bytes == point["bytes"]
        assert policy.model == (probed.policy and probed.policy.model)


def own_choice(probed: Probed, name: str) -> Any:
    assert probed.policy is not None
    return probed.policy.resolve(layer.name for layer in probed.layers)[name]


def test_the_button_saves_the_text(browser: Browser) -> None:
    browser.find("button.act").click()
    path, end = browser.downloads / "policy.yaml", time.monotonic() + 10
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    assert path.read_text() == browser.run("return bitpolicy.policyText()")


def test_the_original_is_uncovered_over_the_policys_image(browser: Browser, data: dict[str, Any]) -> None:
    assert len(data["pairs"]) == 8
    browser.find(".thumbs button:nth-child(3)").click()
    script = "return [...document.querySelectorAll('.wipe img')].map(e => [e.src, e.naturalWidth, e.style.clipPath])"
    (own, _, _), (original, width, clip) = browser.run(script)
    assert [original, own] == data["pairs"][2]
    assert (width, clip) == (160, "inset(0px 50% 0px 0px)")
    browser.find(".uncover input").send_keys("\ue011")  # home
    assert browser.run(script)[1][2] == "inset(0px 100% 0px 0px)"
