"""Pages of results in a real browser, without a network: what is seen, and what a switch does."""

import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from pages import number
from test_inversion import make_response, solve_quietly

import jaxpattern as jp

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1200,900",
)  # fmt: skip
EVIL = "<script>window.pwned = 1</script>"
WORDS = [["The", " cat", EVIL, "\n"], *([f"w{i}{t}" for t in range(4)] for i in range(4))]
PROSE = ["<img src=x onerror='window.pwned = 2'>", *(f"text {i}" for i in range(1, 9))]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    yield driver
    driver.quit()


@pytest.fixture
def show(browser, tmp_path):
    """Writes a page and opens it; nothing may be said in the console, before or after."""

    def act(result, **given):
        browser.get(jp.report(result, tmp_path / "page.html", **given).as_uri())
        assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"
        return browser

    yield act
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return window.pwned ?? null") is None


@pytest.fixture(scope="module")
def response():
    made = make_response(3, halves=True)
    mass = {"code": made.mass["code"].at[1, 2].set(0), "prose": made.mass["prose"]}
    return replace(made, mass=mass, stderr={n: 0.3 + 0 * x for n, x in made.stderr.items()})


CHIPS = """return [...document.querySelectorAll(".token[data-at]")].map(chip => [
    Number(chip.dataset.at), chip.className, getComputedStyle(chip).backgroundColor,
    Number(chip.style.getPropertyValue("--v")), chip.textContent])"""


def chips(browser):
    """Column → (classes, background, strength, text) of what is drawn."""
    return {at: rest for at, *rest in browser.execute_script(CHIPS)}


def choose(browser, name, value):
    """What a person does with a select or a box."""
    browser.execute_script(
        """const control = document.querySelector(`.${arguments[0]}`);
        if (control.type === "checkbox") control.click();
        else { control.value = arguments[1]; control.dispatchEvent(new Event("change")); }""",
        name, value,
    )  # fmt: skip


def rows_of(browser, name):
    """The texts of a table's body."""
    return browser.execute_script(
        """return [...document.querySelectorAll(`table.${arguments[0]} tbody tr`)].map(
        row => [...row.cells].map(cell => cell.textContent))""",
        name,
    )  # fmt: skip


def flat(parts, k):
    """Row k over all columns, in float64."""
    return np.concatenate([np.float64(part[k]).ravel() for part in parts.values()])


def test_a_switch_of_the_row_changes_the_colors(show, response):
    browser = show(response, tokens={"code": WORDS})
    counted = np.concatenate([np.ravel(x) > 0 for x in response.mass.values()])
    seen = []
    for k in (0, 2):
        choose(browser, "choice", f"row {k}")
        sizes = np.sort(np.abs(flat(response.chi, k)[counted]))
        top = sizes[int(np.ceil(0.99 * len(sizes))) - 1]
        drawn = chips(browser)
        assert len(drawn) == 15
        for at, (kind, background, strength, _) in drawn.items():
            chi = float(response.chi["code"][k].ravel()[at])
            if at == 5:
                assert kind == "token out"  # its mass is 0
                continue
            assert kind == ("token pos" if chi > 0 else "token neg")
            assert strength == pytest.approx(min(abs(chi) / top, 1), abs=6e-4)
            red, _, blue = browser.execute_script(
                """const paint = document.createElement("canvas").getContext("2d",
                    {willReadFrequently: true});
                paint.fillStyle = "white"; paint.fillRect(0, 0, 1, 1);
                paint.fillStyle = arguments[0]; paint.fillRect(0, 0, 1, 1);
                return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3)""",
                background,
            )  # fmt: skip
            if strength > 0.1:
                assert (red > blue) == (chi > 0)
        seen.append({at: chip[1] for at, chip in drawn.items()})
    assert sum(seen[0][at] != seen[1][at] for at in seen[0]) >= 13


def test_text_that_is_a_program_does_nothing(show, response):
    browser = show(
        replace(response, rows=(EVIL, "row1", "row2")), tokens={"code": WORDS, "prose": PROSE}
    )
    assert chips(browser)[1][-1] == EVIL
    for choice, probe in (("row 1", "code"), ("direction 0", "prose"), ("row 0", "prose")):
        choose(browser, "choice", choice)
        choose(browser, "probe", probe)
    assert chips(browser)[0][-1] == PROSE[0]
    assert browser.execute_script("return document.images.length") == 0
    assert browser.execute_script("return document.scripts.length") == 2
    assert rows_of(browser, "response-matrix")[0][0] == EVIL


def test_a_tooltip_says_chi_its_error_and_the_loss(show, response):
    losses = {"code": np.arange(15.0).reshape(5, 3) / 7}
    browser = show(response, tokens={"code": WORDS}, losses=losses)
    choose(browser, "choice", "row 1")
    for at in (0, 7, 14):
        browser.execute_script(
            """document.querySelector(`.token[data-at="${arguments[0]}"]`).dispatchEvent(
            new PointerEvent("pointerover", {bubbles: true}))""",
            at,
        )  # fmt: skip
        word, chi, loss, where = browser.execute_script(
            "return document.getElementById('tip').innerText"
        ).split("\n")
        assert word == f"“{WORDS[at // 3][at % 3 + 1]}”"
        got, rounding = number(chi.removeprefix("χ = ").split("   ")[0])
        assert abs(got[0] - float(response.chi["code"][1].ravel()[at])) < rounding[0]
        assert abs(got[1] - 0.3) < rounding[1]
        assert "(row1)" in chi
        assert float(loss.split()[1]) == pytest.approx(at / 7, rel=6e-3)
        assert where == f"code, sequence {at // 3}, loss {at % 3}"


def test_extremes_come_in_order_and_lead_to_their_place(show, response):
    browser = show(response, tokens={"code": WORDS, "prose": PROSE})
    counted = np.concatenate([np.ravel(x) > 0 for x in response.mass.values()])
    names = [f"code {i // 3}:{i % 3}" for i in range(15)] + [f"prose {i}" for i in range(9)]
    for order in ("value", "ratio"):
        choose(browser, "order", order)
        choose(browser, "choice", "row 1")
        chi = flat(response.chi, 1)
        key = chi if order == "value" else chi / flat(response.stderr, 1)
        ranked = [i for i in np.argsort(key) if counted[i]]
        for table, wanted in (("largest", ranked[::-1]), ("smallest", ranked)):
            rows = rows_of(browser, table)
            assert [row[1] for row in rows] == [names[i] for i in wanted[:10]]
            for row, i in zip(rows, wanted, strict=False):
                got, rounding = number(row[0])
                assert abs(got[0] - chi[i]) < rounding[0]
    (place,) = [row[1] for row in rows_of(browser, "largest") if row[1].startswith("prose")][:1]
    browser.execute_script(
        """[...document.querySelectorAll("table.largest button")].find(
        button => button.textContent === arguments[0]).click()""",
        place,
    )  # fmt: skip
    detail = browser.execute_script("return document.querySelector('.detail').textContent")
    assert f"prose, sample {place.split()[1]}" in detail
    assert browser.execute_script("return document.querySelectorAll('.here').length") == 1


def test_small_numbers_share_a_power_of_ten(show, response):
    small = replace(
        response,
        chi={name: 3e-5 * x for name, x in response.chi.items()},
        stderr={name: 3e-5 * x for name, x in response.stderr.items()},
    )
    browser = show(small, tokens={"code": WORDS})
    chi = flat(response.chi, 0)
    value, place, _ = rows_of(browser, "largest")[0]
    names = [f"code {i // 3}:{i % 3}" for i in range(15)] + [f"prose {i}" for i in range(9)]
    got, rounding = number(value)
    assert abs(got[0] - 30 * chi[names.index(place)]) < rounding[0]
    assert abs(got[1] - 9) < rounding[1]
    head = browser.execute_script("return document.querySelector('.largest th').textContent")
    assert head == "χ, 10⁻⁶"
    legend = browser.execute_script("return document.querySelector('.legend').textContent")
    assert "10⁻⁶ nats × loss" in legend


def test_each_text_can_be_listed_once(show, response):
    browser = show(response, tokens={"code": [["", "a", "b", "c"]] * 5})
    choose(browser, "once", None)
    chi = np.float64(response.chi["code"][0]).ravel()
    best = {}
    for i in np.argsort(-chi, kind="stable"):
        if i != 5:
            best.setdefault(i % 3, f"code {i // 3}:{i % 3}")
    places = [row[1] for row in rows_of(browser, "largest")]
    assert [place for place in places if place.startswith("code")] == list(best.values())


def test_coordinates_are_those_of_the_directions(show, response):
    browser = show(response, tokens={"code": WORDS})
    choose(browser, "choice", "direction 1")
    directions = jp.principal_directions(response)
    wanted = np.concatenate([np.float64(x[1]).ravel() for x in directions.coordinates.values()])
    names = [f"code {i // 3}:{i % 3}" for i in range(15)] + [f"prose {i}" for i in range(9)]
    rows = rows_of(browser, "largest")
    assert len(rows) == 10
    for value, place, _ in rows:
        assert float(value) == pytest.approx(wanted[names.index(place)], rel=6e-3)


def test_keys_move_from_token_to_token(show, response):
    from selenium.webdriver.common.keys import Keys

    browser = show(response, tokens={"code": WORDS})
    text = browser.find_element("class name", "text")
    text.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    here = browser.execute_script("return document.querySelector('.here').dataset.at")
    assert here == "1"
    detail = browser.execute_script("return document.querySelector('.detail').textContent")
    assert EVIL in detail
    assert "sequence 0, loss 1" in detail


def test_what_is_within_its_error_can_be_hidden(show, response):
    browser = show(response)
    choose(browser, "clear", None)
    for at, (kind, *_, text) in chips(browser).items():
        chi = float(response.chi["code"][0].ravel()[at])
        assert ("pos" in kind or "neg" in kind) == (abs(chi) >= 0.6 and at != 5)
        assert text == f"{at % 3} "  # no tokens were given: positions


def test_the_matrix_can_be_colored_row_by_row(show, response):
    browser = show(response)
    get = """return [...document.querySelectorAll("table.response-matrix tbody tr")].map(
        row => Math.max(...[...row.querySelectorAll(".heat")].map(
            cell => Number(getComputedStyle(cell).getPropertyValue("--v")))))"""
    assert sorted(browser.execute_script(get))[0] < 1
    choose(browser, "by-row", None)
    assert browser.execute_script(get) == [1, 1, 1]


def test_weights_are_drawn_around_one(show, response):
    solution = solve_quietly(response, {"row0": 0.05})
    browser = show(solution, tokens={"code": WORDS}, realised={"again": {"row0": (0.04, 0.01)}})
    for at, (kind, *_) in chips(browser).items():
        weight = float(solution.weights["code"].ravel()[at])
        wanted = "out" if at == 5 else "pos" if weight >= 1 else "neg"
        assert kind == f"token {wanted}"
    assert browser.execute_script("return document.querySelectorAll('td.drawn svg').length") == 3
    assert browser.execute_script("return document.querySelector('.clear').offsetParent") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_on_every_color(show, response, scheme):
    """WCAG 2.1 asks for a contrast of 4.5; here of the strongest colors, in both schemes."""
    browser = show(response)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    names = ("page", "panel", "ink", "soft", "pos", "neg", "fine", "doubt")
    values = browser.execute_script(
        """const style = getComputedStyle(document.documentElement), paint =
        document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        return arguments[0].map(name => {
            paint.fillStyle = style.getPropertyValue(`--${name}`);
            paint.fillRect(0, 0, 1, 1);
            return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
        })""",
        names,
    )  # fmt: skip
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def luminance(color):
        x = np.array(color) / 255
        linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    light = {name: luminance(value) for name, value in zip(names, values, strict=True)}
    assert (light["page"] > 0.5) == (scheme == "light")
    pairs = [("ink", name) for name in ("page", "panel", "pos", "neg", "fine", "doubt")]
    for text, ground in [*pairs, ("soft", "page"), ("soft", "panel")]:
        low, high = sorted((light[text], light[ground]))
        assert (high + 0.05) / (low + 0.05) > 4.5, (text, ground)


def test_a_hundred_thousand_tokens_in_sixteen_rows(show):
    """Only a screenful is drawn, and the last one is found."""
    shape, rng = (800, 125), np.random.default_rng(0)
    chi = rng.normal(size=(16, 100_000)).astype(np.float32)
    response = replace(
        make_response(chi=chi, mass=np.ones(100_000), shapes={"text": shape}, dtype=jnp.float32),
        batches={"text": jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)},
    )
    browser = show(response, tokens={"text": rng.integers(97, 123, (800, 126))})
    count = "return document.querySelectorAll('*').length"
    assert browser.execute_script(count) < 4000
    choose(browser, "choice", "row 15")
    choose(browser, "sequence", "799")
    assert max(chips(browser)) == 99_999
    assert browser.execute_script(count) < 4000
    best = int(np.argmax(chi[15]))
    assert rows_of(browser, "largest")[0][1] == f"text {best // 125}:{best % 125}"


def test_one_long_sequence_is_cut_into_screens(show):
    response = make_response(2, shapes={"text": (1, 4500)}, halves=True)
    browser = show(response, tokens={"text": [[f"t{i} " for i in range(4501)]]})
    texts = []
    for _ in range(3):
        texts += [chip[-1] for chip in chips(browser).values()]
        browser.execute_script("document.querySelector('.after').click()")
    assert texts == [f"t{i} " for i in range(1, 4501)]
