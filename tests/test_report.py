"""The page that `lens.py report` writes, in a real browser."""

import inspect
import itertools
import re
import shutil

import numpy as np
import pytest

from gpt2 import gpt2
from helpers import TINY, random_params, run
from lens import logit_lens, next_tokens, report_data, surprisal, trace, write_report
from pictures import PAGE, save_page, token_labels
from sampling import apply_temperature, apply_top_k, apply_top_p, to_probabilities

PROMPT = "def main(prompt: str) ->\nNone"
HOSTILE = "</script><img src=x onerror=hurt=1><b>&lt;"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
N_HEAD = TINY["n_head"]
FOCUSED = "(({id, name, className, tagName}) => id || name || className || tagName)(document.activeElement)"
CONTRASTS = """() => {  // of the text with the strongest colours that a token can have (WCAG 2.1, "contrast ratio")
    const channels = (element, name) => getComputedStyle(element)[name].match(/[\\d.]+/g).map(Number);
    const linear = (c) => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const ink = luminance(channels(document.body, "color"));
    const probe = document.body.appendChild(document.createElement("span"));
    const places = [["heat", heat(99), document.body], ["gaze", gaze(1), document.querySelector("article")]];
    return places.map(([name, share, place]) => {
        tint(probe, name, share);
        const [r, g, b, alpha] = channels(probe, "backgroundColor"), ground = channels(place, "backgroundColor");
        const paper = luminance([r, g, b].map((c, i) => alpha * c + (1 - alpha) * ground[i]));
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    });
}"""


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
def reports(tmp_path_factory, tiny_model):
    """The path of the report of a prompt on the tiny model, made as a user would."""
    made = {}

    def report(prompt=PROMPT):
        if prompt not in made:
            path = tmp_path_factory.mktemp("report") / "report.html"
            done = run("lens.py", "report", f"--prompt={prompt}", f"--out={path}", f"--model_size={tiny_model}")
            assert done.returncode == 0, done.stderr
            made[prompt] = path
        return made[prompt]

    return report


@pytest.fixture
def open_page(browser, reports):
    """Open a report; at the end, there must have been no error, no warning and no request but for the page itself."""
    noise, pages = [], []

    def show(prompt=PROMPT, path=None, **options):
        url = (path or reports(prompt)).as_uri()
        page = browser.new_page(**options)
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
    assert page.title() == "Inside tiny"
    assert page.locator("#tokens .token").all_text_contents() == token_labels(traced["ids"], tiny_encoder)
    titles = page.eval_on_selector_all("#tokens .token", "tokens => tokens.map(token => token.title)")
    bits = surprisal(traced["ids"], traced["logits"])
    assert titles == ["the first", *(f"{n:.2f} bits" for n in bits)]
    summary = page.inner_text("#summary")
    assert f"{bits.mean():.2f} bits each on average" in summary
    assert f"as between {2 ** bits.mean():.1f} equally likely tokens (its perplexity)" in summary
    assert page.locator("#tokens br").count() == PROMPT.count("\n")


def opacities(page, selector):
    colours = page.eval_on_selector_all(selector, "all => all.map(one => getComputedStyle(one).backgroundColor)")
    return [float(re.findall(r"[\d.]+", colour)[3]) for colour in colours]


def test_the_colours_follow_what_they_stand_for(open_page, traced):
    page = open_page()
    bits = surprisal(traced["ids"], traced["logits"])
    np.testing.assert_allclose(opacities(page, "#tokens .token"), [0, *0.75 * np.minimum(bits / 16, 1)], atol=0.003)
    page.select_option("#layer", "1")
    weights = traced["attention"][1, :, -1]
    np.testing.assert_allclose(opacities(page, ".strip span"), 0.65 * np.sqrt(weights.flat), atol=0.006)
    np.testing.assert_allclose(opacities(page, "#scale span"), 0.75 * np.array([1, 4, 8, 12, 16]) / 16, atol=0.003)


def test_the_bars_are_as_long_as_the_probabilities(open_page, traced):
    page = open_page()
    widths = page.eval_on_selector_all("#next .bar div", "bars => bars.map(bar => parseFloat(bar.style.width))")
    _, probabilities = next_tokens(traced["logits"][-1], 200)
    np.testing.assert_allclose(widths[:200], 100 * probabilities / probabilities[0], atol=0.01)


def test_the_token_that_the_text_goes_on_with_is_marked(open_page, traced, tiny_encoder):
    page = open_page()
    seen = set()
    for position, after in enumerate(traced["ids"][1:]):
        choose(page, position)
        ids, _ = next_tokens(traced["logits"][position], 200)
        name = token_labels([after], tiny_encoder)[0] if after in ids else "the other 100"
        assert page.locator("#next tr.next td.token").all_text_contents() == [name]
        seen.add(after in ids)
    assert seen == {True, False}
    choose(page, len(traced["ids"]) - 1)
    assert page.locator("#next tr.next").count() == 0


def test_a_click_on_a_token_shows_what_the_model_computed_there(open_page, traced, tiny_params, tiny_encoder):
    page = open_page()
    labels = token_labels(traced["ids"], tiny_encoder)
    lens = logit_lens(traced, tiny_params)
    seen = set()
    for position in (len(labels) - 1, 4, 0):
        choose(page, position)
        ids, probabilities = next_tokens(traced["logits"][position], 200)
        *found, rest = rows(page, "#next")
        expected = zip(token_labels(ids, tiny_encoder), probabilities, strict=True)
        assert [cells[:2] for cells in found] == [[label, f"{p:.2%}"] for label, p in expected]
        assert rest[:2] == ["the other 100", f"{1 - probabilities.sum():.2%}"]
        assert rows(page, "#lens") == [
            [
                "embedding" if i == 0 else f"after block {i - 1}",
                token_labels([lens["ids"][i, position]], tiny_encoder)[0],
                f"{lens['probabilities'][i, position]:.2%}",
                str(lens["ranks"][i, position]),
            ]
            for i in range(TINY["n_layer"] + 1)
        ]
        chosen = page.inner_text("#chosen")
        assert f"Position {position}: after {labels[position]} " in chosen
        if position + 1 < len(labels):
            after = traced["ids"][position + 1]
            rank = 1 + (traced["logits"][position] > traced["logits"][position, after]).sum()
            share = to_probabilities(traced["logits"][position])[after]
            assert f"goes on with {labels[position + 1]}, the model’s choice number {rank}, " in chosen
            assert chosen.endswith(f"{share:.2%}.")
        else:
            assert chosen.endswith(f"the text ends. The likeliest to come next: {found[0][0]}, {found[0][1]}.")
        seen.add(chosen)
    assert len(seen) == 3


@pytest.mark.parametrize("layer", range(TINY["n_layer"]))
def test_each_head_shows_its_weights(open_page, traced, tiny_encoder, layer):
    page = open_page()
    labels = token_labels(traced["ids"], tiny_encoder)
    page.select_option("#layer", str(layer))
    for position in (len(labels) - 1, 3, 0):
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
            shown = f"{labels[position // 2]} ({position // 2}) "
            shown += f"{round(float(weights[head, position // 2]), 4):.2%}"
            assert heads.nth(head).locator(".readout").inner_text() == shown
            assert spans.nth(position // 2).get_attribute("title") == shown
    choose(page, len(labels) - 1)
    page.mouse.move(0, 0)
    assert page.locator(".readout").first.inner_text() == ""
    for head in range(N_HEAD):
        best = traced["attention"][layer, head, -1].argmax()
        assert page.locator(".most").nth(head).inner_text().startswith(f"most on {labels[best]} ({best}) ")
    page.locator(".strip").first.locator("span").nth(3).click()
    assert "Position 3:" in page.inner_text("#chosen")
    choose(page, 3)
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
        np.testing.assert_allclose(found["likeliest"], expected[ids], atol=1e-6)
        np.testing.assert_allclose(found["others"], 1 - expected[ids].sum(), atol=1e-6)


def test_where_top_p_ends_among_the_others_their_share_is_all_but_exact(open_page, tiny_encoder, tmp_path):
    params = {**random_params(TINY), "wte": np.random.default_rng(0).normal(0, 0.01, (300, 48)).astype(np.float32)}
    ids = [5, 6]
    save_page({"model": "flat", **report_data(ids, params, N_HEAD, tiny_encoder)}, str(tmp_path / "flat.html"))
    page = open_page(path=tmp_path / "flat.html")
    logits = gpt2(ids, **params, n_head=N_HEAD)[1]
    best, probabilities = next_tokens(logits, 200)
    assert probabilities.sum() < 0.8
    expected = reference(logits, 1, 0, 0.9)
    found = page.evaluate("distribution(1, 1, 0, 0.9)")
    assert 0.05 < found["others"] == pytest.approx(1 - expected[best].sum(), abs=probabilities[-1])
    assert all(found["kept"])
    assert sum(found["likeliest"]) + found["others"] == pytest.approx(1)


def test_the_sliders_change_what_is_shown_and_can_be_set_back(open_page, traced):
    page = open_page()
    before = rows(page, "#next")
    slide(page, temperature=0.7, top_k=12, top_p=0.85)
    expected = np.sort(reference(traced["logits"][-1], 0.7, 12, 0.85))[::-1]
    shown = rows(page, "#next")
    assert [cells[1] for cells in shown[:-1]] == [f"{p:.2%}" for p in expected[:200]]
    n_kept = (expected > 0).sum()
    assert page.locator("#next tr.out").count() == 201 - n_kept
    assert page.inner_text("#kept") == f"Drawn from {n_kept} token{'s' if n_kept > 1 else ''}."
    assert shown[-1][1] == "0.00%"
    outputs = [page.inner_text(f"#{name}-value") for name in ("temperature", "top-k", "top-p")]
    assert outputs == ["0.70", "12", "0.85"]
    choose(page, 2)  # and they hold for every token
    assert page.locator("#next tr.out").count() >= 189
    choose(page, len(traced["ids"]) - 1)
    slide(page, temperature=0)
    assert page.inner_text("#temperature-value") == "0 (the likeliest only)"
    assert page.inner_text("#kept") == "Drawn from 1 token."
    page.click("#reset")
    assert rows(page, "#next") == before
    assert page.inner_text("#kept") == "Drawn from all 300 tokens."


def test_the_sliders_go_as_far_as_the_data(open_page):
    page = open_page()
    assert page.get_attribute("#top-k", "max") == "200"
    assert [page.get_attribute("#temperature", name) for name in ("min", "max", "step")] == ["0", "2", "0.05"]


def test_equal_logits_are_kept_or_ruled_out_together_by_top_k(open_page, tiny_encoder, tmp_path):
    params = random_params(TINY)
    params["wte"][:20] = params["wte"][0]
    ids = [5, 6, 7]
    save_page({"model": "equal", **report_data(ids, params, N_HEAD, tiny_encoder)}, str(tmp_path / "equal.html"))
    page = open_page(path=tmp_path / "equal.html")
    for position, logits in enumerate(gpt2(ids, **params, n_head=N_HEAD)):
        best, _ = next_tokens(logits, 200)
        for top_k, top_p in itertools.product((1, 5, 10, 25), (1, 0.6)):
            expected = reference(logits, 1, top_k, top_p)[best]
            found = page.evaluate("args => distribution(...args)", [position, 1, top_k, top_p])
            np.testing.assert_allclose(found["likeliest"], expected, atol=1e-6)
            assert found["kept"] == [p > 0 for p in expected]


def test_a_token_too_unlikely_for_a_float_is_not_shown_as_ruled_out(open_page, tiny_encoder, tmp_path):
    params = random_params(TINY)
    params["ln_f"]["g"] = params["ln_f"]["g"] * 1000
    save_page({"model": "sharp", **report_data([5], params, N_HEAD, tiny_encoder)}, str(tmp_path / "sharp.html"))
    page = open_page(path=tmp_path / "sharp.html")
    assert page.locator("#next tr.out:not(:last-child)").count() == 0
    slide(page, top_k=3)
    assert page.locator("#next tr.out").count() == 198


def test_nothing_moves_when_a_weight_is_shown(open_page):
    page = open_page(viewport={"width": 400, "height": 700})
    before = page.evaluate("document.documentElement.scrollHeight")
    page.locator(".strip").last.locator("span").nth(1).hover()
    assert page.locator(".readout").last.inner_text()
    assert page.evaluate("document.documentElement.scrollHeight") == before


def test_another_token_is_shown_from_its_likeliest_on(open_page):
    page = open_page()
    page.evaluate("find('next-scroll').scrollTop = 900")
    choose(page, 2)
    assert page.evaluate("find('next-scroll').scrollTop") == 0


def test_all_can_be_done_with_the_keyboard(open_page, traced):
    page = open_page()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(FOCUSED)
        if name == "BODY":
            break
        reached.append(name)
    assert reached[:2] == ["token", "temperature"]
    assert {
        "token",
        "temperature",
        "top-k",
        "top-p",
        "reset",
        "layer",
        "strip",
        "SUMMARY",
        "scroll",
        "next-scroll",
    } == set(reached)
    page.locator("#tokens input").last.focus()
    page.keyboard.press("ArrowLeft")
    assert f"Position {len(traced['ids']) - 2}:" in page.inner_text("#chosen")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('#tokens input:checked + .token')).outlineStyle")
        == "solid"
    )
    page.locator("#top-k").focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#top-k-value") == "1"
    page.locator("#layer").focus()
    page.keyboard.press("ArrowDown")
    assert page.input_value("#layer") == "1"
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#weights tr").first.is_visible()


@pytest.mark.parametrize("prompt", [HOSTILE, "<!--<script>", "{{data}}", "\\u003c\u2028 $& `${1}`", "\x00\x1b日é\r\n"])
def test_any_text_stays_text(open_page, shakespeare, prompt, tmp_path):
    encoder, hparams, params = shakespeare
    ids = encoder.encode(prompt)
    save_page({"model": HOSTILE, **report_data(ids, params, hparams["n_head"], encoder)}, str(tmp_path / "page.html"))
    page = open_page(path=tmp_path / "page.html")
    assert page.locator("#tokens .token").all_text_contents() == token_labels(ids, encoder)
    assert page.inner_text("h1") == f"Inside {HOSTILE}"
    assert page.locator("img, b").count() == 0
    assert page.evaluate("window.hurt === undefined")


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1200, "light")])
def test_the_page_meets_wcag_aa_and_fits_its_window(open_page, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    page = open_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.locator("summary").click()
    for position in (0, 5):  # at the first, all heads have the strongest colour
        choose(page, position)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
        response = axe.run(page, options=rules).response
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in response["violations"]] == []
        assert "color-contrast" in [rule["id"] for rule in response["passes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(open_page, scheme):
    page = open_page(color_scheme=scheme)
    ratios = page.evaluate(CONTRASTS)
    assert min(ratios) >= 4.5


def test_the_template_is_not_written_over_by_a_report():
    assert not PAGE.with_name(inspect.signature(write_report).parameters["out"].default).exists()


def test_a_text_of_one_token_can_be_looked_at(open_page):
    page = open_page("a")
    assert "a text of 1 token." in page.inner_text("#summary")
    assert page.locator("#next tr").count() == 201
    assert page.locator(".most").first.inner_text() == "most on a (0) 100.00%"


def test_a_report_of_64_tokens_at_the_shape_of_124m_is_below_2_mb(open_page, gpt2_encoder, tmp_path):
    hparams = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 48, "n_head": 12, "n_layer": 12}  # the width does not matter
    ids = np.random.default_rng(0).integers(0, 50257, 64).tolist()
    path = tmp_path / "page.html"
    save_page({"model": "124M", **report_data(ids, random_params(hparams), 12, gpt2_encoder)}, str(path))
    assert 10**6 < path.stat().st_size < 2 * 10**6
    page = open_page(path=path)
    assert page.locator("#tokens .token").count() == 64
    assert page.locator("#heads article").count() == 12
