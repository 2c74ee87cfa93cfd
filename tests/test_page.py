"""The page of a report in a real browser: it shows what the model computed, and its sliders work as sampling does."""

import itertools
import re
import shutil

import numpy as np
import pytest

from gpt2 import gpt2
from helpers.models import TINY, random_params
from helpers.processes import run
from lens import logit_lens, next_tokens, report_data, surprisal, trace
from sampling import apply_temperature, apply_top_k, apply_top_p, to_probabilities
from show.output import save_page
from show.terminal import token_labels

PROMPT = "def main(prompt: str) ->\nNone"
HOSTILE = "</script><img src=x onerror=hurt=1><b>&lt;"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
N_HEAD = TINY["n_head"]
FOCUSED = "(({id, name, className, tagName}) => id || name || className || tagName)(document.activeElement)"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory, tiny_model):
    """The path of the report of PROMPT on the tiny model, made as a user would."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    done = run("lens.py", "report", PROMPT, f"--out={path}", f"--model_size={tiny_model}")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"wrote {path}\n", b"")
    return path


@pytest.fixture
def open_page(browser, report):
    """Open a report. In the end there must be no error, no warning, and no request except for the page itself."""
    noise, pages = [], []

    def show(path=report, **options):
        url, page = path.as_uri(), browser.new_page(**options)
        pages.append(page)
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: noise.append(request.url) if request.url not in (url, "data:,") else None)
        page.goto(url)
        return page

    yield show
    for page in pages:
        page.close()
    assert noise == []


@pytest.fixture(scope="module")
def traced(tiny_params, tiny_encoder):
    return trace(tiny_encoder.encode(PROMPT), tiny_params, N_HEAD)


@pytest.fixture
def open_data(open_page, tiny_encoder, tmp_path):
    """Write and open the report of token ids, for a model without a directory; also returns the size of the file."""

    def show(ids, params, n_head=N_HEAD, encoder=tiny_encoder, model="model"):
        path = tmp_path / "page.html"
        save_page({"model": model, **report_data(ids, params, n_head, encoder)}, str(path))
        return open_page(path), path.stat().st_size

    return show


def choose(page, position):
    page.locator("#tokens label").nth(position).click()


def rows(page, selector):
    return [[cell.strip() for cell in row] for row in page.eval_on_selector_all(
        f"{selector} tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )]  # fmt: skip


def slide(page, **values):
    for name, value in values.items():
        page.locator(f"#{name.replace('_', '-')}").fill(str(value))


def reference(logits, temperature, top_k, top_p):
    """The whole distribution, by sampling.py."""
    logits = apply_temperature(logits.astype(np.float64), temperature)
    return to_probabilities(apply_top_p(apply_top_k(logits, top_k), top_p))


def test_the_text_is_shown_as_tokens_with_their_surprisal(open_page, traced, tiny_encoder):
    page = open_page()
    assert (page.title(), page.locator("#tokens br").count()) == ("Inside tiny", PROMPT.count("\n"))
    assert page.locator("#tokens .token").all_text_contents() == token_labels(traced["ids"], tiny_encoder)
    titles = page.eval_on_selector_all("#tokens .token", "tokens => tokens.map(token => token.title)")
    bits = surprisal(traced["ids"], traced["logits"])
    assert titles == ["the first token", *(f"{n:.2f} bits" for n in bits)]
    summary = page.inner_text("#summary")
    assert f"{bits.mean():.2f} bits each on average" in summary
    assert f"as between {2 ** bits.mean():.1f} equally likely tokens (the perplexity)" in summary


def opacities(page, selector):
    colours = page.eval_on_selector_all(selector, "all => all.map(one => getComputedStyle(one).backgroundColor)")
    return [float([*re.findall(r"[\d.]+", colour), 1][3]) for colour in colours]  # an opaque colour has three numbers


def test_colours_follow_surprisal_and_weights(open_page, traced):
    page = open_page()
    bits = surprisal(traced["ids"], traced["logits"])
    most = 9  # bits: log2 of the vocabulary of 300, rounded up
    np.testing.assert_allclose(opacities(page, "#tokens .token"), [0, *0.75 * np.minimum(bits / most, 1)], atol=0.003)
    assert page.locator("#scale span").all_inner_texts() == ["0", "2", "4", "6", "8", "9+"]
    np.testing.assert_allclose(opacities(page, "#scale span"), 0.75 * np.array([0, 2, 4, 6, 8, 9]) / most, atol=0.004)
    page.select_option("#layer", "1")
    weights = traced["attention"][1, :, -1]
    shares = (weights / weights.max(axis=-1, keepdims=True)).flat
    np.testing.assert_allclose(opacities(page, ".strip span"), shares, atol=0.006)
    assert page.locator(".title > span").all_text_contents() == [f"0%{largest:.2%}" for largest in weights.max(axis=-1)]


def test_bars_go_from_0_to_100_percent_or_to_the_most_likely_token(open_page, traced):
    page = open_page()
    _, probabilities = next_tokens(traced["logits"][-1], 200)
    for choice, full, end in (("all", 1, "100%"), ("best", probabilities[0], f"{probabilities[0]:.2%}")):
        page.select_option("#bars", choice)
        widths = page.eval_on_selector_all("#next .bar div", "bars => bars.map(bar => parseFloat(bar.style.width))")
        np.testing.assert_allclose(widths[:200], 100 * probabilities / full, atol=0.01)
        assert page.inner_text("#bar-end") == end


def test_the_headings_of_the_two_columns_are_aligned(open_page):
    page = open_page(viewport={"width": 1280, "height": 800})
    title, left, right = (page.locator(name).bounding_box() for name in ("h1", "#h-text", "#h-next"))
    assert (left["x"], left["y"]) == (title["x"], right["y"]) and left["x"] < right["x"]


def test_a_click_on_a_token_shows_what_the_model_computed_there(open_page, traced, tiny_params, tiny_encoder):
    page, lens = open_page(), logit_lens(traced, tiny_params)
    labels, seen = token_labels(traced["ids"], tiny_encoder), set()
    for position, logits in reversed([*enumerate(traced["logits"])]):
        choose(page, position)
        ids, probabilities = next_tokens(logits, 200)
        *found, rest = rows(page, "#next")
        assert [cells[0] for cells in found] == token_labels(ids, tiny_encoder)
        np.testing.assert_allclose([float(cells[1][:-1]) / 100 for cells in found], probabilities, atol=0.51e-4)
        assert rest[:2] == ["the other 100 tokens", f"{1 - probabilities.sum():.2%}"]
        stages = ("embedding", *(f"after block {i}" for i in range(TINY["n_layer"])))
        columns = zip(stages, *(lens[name][:, position] for name in ("ids", "probabilities", "ranks")), strict=True)
        expected = [[stage, *token_labels([i], tiny_encoder), f"{p:.2%}", str(rank)] for stage, i, p, rank in columns]
        assert rows(page, "#lens") == expected
        chosen, marked = page.inner_text("#chosen"), page.locator("#next tr.next td.token").all_text_contents()
        assert f"Position {position}: after {labels[position]}, " in chosen
        if position + 1 == len(labels):
            assert chosen.endswith("text ends. The most likely next token is {} (probability {}).".format(*found[0]))
            assert marked == []
            continue
        after, label = traced["ids"][position + 1], labels[position + 1]
        assert f"continues with {label} (rank {1 + (logits > logits[after]).sum()}, " in chosen
        assert chosen.endswith(f"probability {to_probabilities(logits)[after]:.2%}).")
        assert marked == [label if after in ids else "the other 100 tokens"]
        seen.add(after in ids)
    assert seen == {True, False}


@pytest.mark.parametrize("layer", range(TINY["n_layer"]))
def test_each_head_shows_its_weights(open_page, traced, tiny_encoder, layer):
    page = open_page()
    labels = token_labels(traced["ids"], tiny_encoder)
    page.select_option("#layer", str(layer))
    for position in (0, 3, len(labels) - 1):
        choose(page, position)
        weights = traced["attention"][layer, :, position, : position + 1]
        heads = page.locator("#heads article")
        assert heads.count() == N_HEAD
        for head in range(N_HEAD):
            spans = heads.nth(head).locator(".strip span")
            assert spans.all_text_contents() == labels[: position + 1]
            found = spans.evaluate_all("spans => spans.map(span => Number(span.dataset.weight))")
            np.testing.assert_allclose(found, weights[head], atol=0.5001e-4)
            spans.nth(position // 2).hover()
            weight = round(float(weights[head, position // 2]), 4)
            shown = f"{labels[position // 2]} ({position // 2}) {weight:.2%}"
            assert heads.nth(head).locator(".readout").inner_text() == shown
            assert spans.nth(position // 2).get_attribute("title") == shown
            best = weights[head].argmax()
            assert heads.nth(head).locator(".most").inner_text().startswith(f"most weight on {labels[best]} ({best}) ")
    page.mouse.move(0, 0)
    assert page.locator(".readout").first.inner_text() == ""
    page.locator(".strip").first.locator("span").nth(3).click()
    assert "Position 3:" in page.inner_text("#chosen")
    page.locator("summary").click()
    table = [[float(cell.rstrip("%")) / 100 for cell in cells[1:]] for cells in rows(page, "#weights")]
    np.testing.assert_allclose(table, traced["attention"][layer, :, 3, :4].T, atol=0.5001e-4)


@pytest.mark.parametrize("temperature", [0, 0.05, 0.3, 0.7, 1, 1.25, 2])
def test_the_controls_reshape_the_distribution_as_sampling_does(open_page, traced, temperature):
    page = open_page()
    for position, top_k, top_p in itertools.product((0, 5), (0, 1, 7, 200), (1, 0.9, 0.5, 0.01)):
        logits = traced["logits"][position]
        ids, _ = next_tokens(logits, 200)
        expected = reference(logits, temperature, top_k, top_p)
        found = page.evaluate("args => distribution(...args)", [position, temperature, top_k, top_p])
        np.testing.assert_allclose(found["listed"], expected[ids], atol=1e-6)
        np.testing.assert_allclose(found["others"], 1 - expected[ids].sum(), atol=1e-6)


def test_if_top_p_ends_among_the_others_their_share_is_almost_exact(open_data):
    params = {**random_params(TINY), "wte": np.random.default_rng(0).normal(0, 0.01, (300, 48)).astype(np.float32)}
    page, _ = open_data([5, 6], params)
    logits = gpt2([5, 6], **params, n_head=N_HEAD)[1]
    best, probabilities = next_tokens(logits, 200)
    assert probabilities.sum() < 0.8
    expected = reference(logits, 1, 0, 0.9)
    found = page.evaluate("distribution(1, 1, 0, 0.9)")
    assert 0.05 < found["others"] == pytest.approx(1 - expected[best].sum(), abs=probabilities[-1])
    assert all(found["kept"])
    assert sum(found["listed"]) + found["others"] == pytest.approx(1)


def test_the_sliders_change_the_distribution_and_can_be_reset(open_page, traced):
    page = open_page()
    limits = [page.get_attribute("#temperature", name) for name in ("min", "max", "step")]
    assert (limits, page.get_attribute("#top-k", "max")) == (["0", "2", "0.05"], "200")  # the limits of the data
    before = rows(page, "#next")
    slide(page, temperature=0.7, top_k=12, top_p=0.85)
    expected = np.sort(reference(traced["logits"][-1], 0.7, 12, 0.85))[::-1]
    shown = rows(page, "#next")
    assert [cells[1] for cells in shown[:-1]] == [f"{p:.2%}" for p in expected[:200]]
    n_kept = (expected > 0).sum()
    assert page.locator("#next tr.out").count() == 201 - n_kept
    assert page.inner_text("#kept") == f"The next token is drawn from {n_kept} token{'s' if n_kept > 1 else ''}."
    assert shown[-1][1] == "0.00%"
    assert page.locator("output").all_inner_texts() == ["0.70", "12", "0.85"]
    choose(page, 2)  # the sliders apply to every token
    assert page.locator("#next tr.out").count() >= 189
    choose(page, len(traced["ids"]) - 1)
    slide(page, temperature=0)
    shown = [page.inner_text(name) for name in ("#temperature-value", "#kept")]
    assert shown == ["0 (only the most likely)", "The next token is drawn from 1 token."]
    page.click("#reset")
    assert (rows(page, "#next"), page.inner_text("#kept")) == (before, "The next token is drawn from all 300 tokens.")


def test_top_k_keeps_or_drops_equal_logits_together(open_data):
    params = random_params(TINY)
    params["wte"][:20] = params["wte"][0]
    page, _ = open_data([5, 6, 7], params)
    for position, logits in enumerate(gpt2([5, 6, 7], **params, n_head=N_HEAD)):
        best, _ = next_tokens(logits, 200)
        for top_k, top_p in itertools.product((1, 5, 10, 25), (1, 0.6)):
            expected = reference(logits, 1, top_k, top_p)[best]
            found = page.evaluate("args => distribution(...args)", [position, 1, top_k, top_p])
            np.testing.assert_allclose(found["listed"], expected, atol=1e-6)
            assert found["kept"] == [p > 0 for p in expected]


def test_a_token_with_a_tiny_probability_is_not_shown_as_ruled_out(open_data):
    params = random_params(TINY)
    params["ln_f"]["g"] = params["ln_f"]["g"] * 1000
    page, _ = open_data([5], params)
    assert page.locator("#next tr.out:not(:last-child)").count() == 0
    slide(page, top_k=3)
    assert page.locator("#next tr.out").count() == 198


def test_showing_a_weight_moves_nothing_and_choosing_a_token_scrolls_its_list_to_the_top(open_page):
    page = open_page(viewport={"width": 400, "height": 700})
    before = page.evaluate("document.documentElement.scrollHeight")
    page.locator(".strip").last.locator("span").nth(1).hover()
    assert page.locator(".readout").last.inner_text()
    assert page.evaluate("document.documentElement.scrollHeight") == before
    page.evaluate("find('next-scroll').scrollTop = 900")
    choose(page, 2)
    assert page.evaluate("find('next-scroll').scrollTop") == 0


def test_everything_works_with_the_keyboard(open_page, traced):
    page = open_page()
    tabs = iter(lambda: (page.keyboard.press("Tab"), page.evaluate(FOCUSED))[1], "BODY")
    reached = [*itertools.islice(tabs, 60)]
    assert reached[:3] == ["token", "scroll", "temperature"]
    places = {"temperature", "top-k", "top-p", "reset", "bars", "next-scroll", "layer", "strip", "SUMMARY", "scroll"}
    assert set(reached) == {"token", *places}
    page.locator("#tokens input").last.focus()
    page.keyboard.press("ArrowLeft")
    assert f"Position {len(traced['ids']) - 2}:" in page.inner_text("#chosen")
    outline = "getComputedStyle(document.querySelector('#tokens input:checked + .token')).outlineStyle"
    assert page.evaluate(outline) == "solid"
    keys = {"#top-k": "ArrowRight", "#layer": "ArrowDown", "#bars": "ArrowDown", "summary": "Enter"}
    for control, key in keys.items():
        page.locator(control).focus()
        page.keyboard.press(key)
    assert [page.input_value(name) for name in ("#top-k", "#layer", "#bars")] == ["1", "1", "best"]
    assert page.locator("#weights tr").first.is_visible()


@pytest.mark.parametrize("prompt", [HOSTILE, "<!--<script>", "{{data}}", "\\u003c\u2028 $& `${1}`", "\x00\x1b日é\r\n"])
def test_any_text_stays_text(open_data, shakespeare, prompt):
    encoder, hparams, params = shakespeare
    ids = encoder.encode(prompt)
    page, _ = open_data(ids, params, hparams["n_head"], encoder, model=HOSTILE)
    assert page.locator("#tokens .token").all_text_contents() == token_labels(ids, encoder)
    assert (page.inner_text("h1"), page.locator("img, b").count()) == (f"Inside {HOSTILE}", 0)
    assert page.evaluate("window.hurt === undefined")


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1200, "light")])
def test_the_page_meets_wcag_aa_and_fits_its_window(open_page, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    page = open_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.locator("summary").click()
    for position in (0, 5):  # the strongest colours are in the scale and, at position 0, in all heads
        choose(page, position)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
        response = axe.run(page, options=rules).response
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in response["violations"]] == []
        assert "color-contrast" in [rule["id"] for rule in response["passes"]]


def test_a_text_of_one_token_has_a_report(open_data, tiny_params, tiny_encoder):
    page, _ = open_data(tiny_encoder.encode("a"), tiny_params)
    assert page.inner_text("#summary").endswith("The text has 1 token.")
    assert page.locator("#next tr").count() == 201
    assert page.locator(".most").first.inner_text() == "most weight on a (0) 100.00%"


def test_a_report_of_64_tokens_at_the_shape_of_124m_is_below_2_mb(open_data, gpt2_encoder):
    hparams = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 48, "n_head": 12, "n_layer": 12}  # the width does not matter
    ids = np.random.default_rng(0).integers(0, 50257, 64).tolist()
    page, size = open_data(ids, random_params(hparams), 12, gpt2_encoder)
    assert 10**6 < size < 2 * 10**6
    assert [page.locator(shown).count() for shown in ("#tokens .token", "#heads article")] == [64, 12]
