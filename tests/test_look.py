"""The page that shows what a memory looks up: its figures, and what it does in a real browser."""

import base64
import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import look
from conftest import call, same_weights
from data import load_tokenizer
from eval import sum_nll
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from upscale import METHODS, upscale

METHOD_OF = {"head.pt": ("midus", {}), "token.pt": ("midus", {"query": "token"})}
if "ngram" in METHODS:
    METHOD_OF["ngram.pt"] = ("ngram", {})
TEXT = "</script><script>document.title = 'run'</script>\nclass Caf\u00e9:\n    pass\n" * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and deeper models with filled memories, and a text: one to be looked at, once."""
    folder = tmp_path_factory.mktemp("look")
    (folder / "text").mkdir()
    for split in ("train", "valid", "test"):
        (folder / "text" / f"{split}.txt").write_text("Some words, some < less & more.\n" * 40)
    torch.manual_seed(0)
    base = GPT(GPTConfig(4, 2, 16, 12, 257))
    about = {"tokenizer": "bytes", "dataset": str(folder / "text")}
    save_checkpoint(folder / "base.pt", base, **about)
    for name, (method, options) in METHOD_OF.items():
        sizes = {"n_keys": 6, "d_latent": 4} | ({"top_k": 3} if method == "midus" else {})
        model = upscale(base, method, **sizes, **options)
        for i in model.config.new:
            torch.nn.init.normal_(model.h[i].memory.hive.bank)
        save_checkpoint(folder / name, model, **about)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """The page of all models, and its data."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        words = [*METHOD_OF, "--text", TEXT, "--device", "cpu"]
        assert call(monkeypatch, "look.py", *words) == 0
    path = folder / "memory.html"
    source = path.read_text(encoding="utf-8")
    return path, json.loads(re.search(r'id="data">(.*?)</script>', source)[1])


def unpack(packed, kind):
    return np.frombuffer(base64.b64decode(packed), kind).astype(np.int64)


# ---- Figures -------------------------------------------------------------------------------------
def test_losses_with_and_without_the_new_blocks(folder):
    """As eval.py has them; without the new blocks there is the base again."""
    base, _ = load_checkpoint(str(folder / "base.pt"))
    tokens = np.frombuffer(TEXT.encode(), np.uint8)[: 12 * 7 + 1]  # whole windows
    for name in METHOD_OF:
        model, _ = load_checkpoint(str(folder / name))
        looked = look.look_up(model, tokens)
        assert looked["with"]["loss"].sum().item() == pytest.approx(sum_nll(model, tokens)[0])
        assert looked["without"]["loss"].sum().item() == pytest.approx(sum_nll(base, tokens)[0])


def test_what_is_read_is_what_the_page_holds(folder, page):
    _, data = page
    assert "".join(data["text"]) == TEXT  # the two bytes of a letter stand at the second
    for name, shown in zip(METHOD_OF, data["models"], strict=True):
        model, _ = load_checkpoint(str(folder / name))
        looked = look.look_up(model, np.frombuffer(TEXT.encode(), np.uint8))
        for reads, block in zip(looked["reads"].values(), shown["blocks"], strict=True):
            n, k = block["n"], block["k"]
            slots = unpack(block["slots"], "<u2").reshape(-1, 2, k)
            weights = unpack(block["weights"], "u1").reshape(-1, 2, k)
            assert (slots == reads["slots"].numpy()).all() and (weights.sum(-1) == 255).all()
            assert np.abs(weights / 255 - reads["weights"].numpy()).max() < 0.01
            if "rows" not in block:
                continue

            # k rows are shaded, and the slots that won lie in such rows.
            packed = unpack(block["rows"], "u1")
            shades = (packed[:, None] >> np.array([0, 2, 4, 6])) & 3
            shades = shades.flatten()[: len(slots) * 2 * n].reshape(-1, 2, n)
            assert ((shades > 0).sum(-1) == k).all()
            assert (np.take_along_axis(shades, slots // n, axis=-1) > 0).all()


def test_a_slot_that_is_zeroed(folder):
    """The loss where it was read, from a model without its entry; the model itself stays."""
    model, _ = load_checkpoint(str(folder / "token.pt"))
    again, _ = load_checkpoint(str(folder / "token.pt"))
    text = np.frombuffer((folder / "text" / "valid.txt").read_bytes(), np.uint8).astype(np.int64)
    x, y = (torch.from_numpy(text[i : i + 120]).view(10, 12) for i in (0, 1))
    block, slots = min(look.busy_slots(model, x, y, load_tokenizer("bytes")).items())
    assert same_weights(model, again) and 0 < len(slots) <= 20

    # One window of ten is tried: the first of those where the slot was read.
    reads = look.look_up(model, text[:12])["reads"][block]
    row = next(row for row in slots if (reads["slots"][..., 0] == row["slot"]).any())
    here = (reads["slots"][..., 0] == row["slot"]).any(-1)
    with torch.no_grad():
        again.h[block].memory.hive.bank[row["slot"]] = 0
    losses = [look.losses(one, x[:1], y[:1])[0, here].mean().item() for one in (model, again)]
    assert row["tried"] == here.sum() and row["loss"] == pytest.approx(losses, abs=1e-3)


def test_the_still_and_the_tables(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = ("token.pt", "--device", "cpu", "--tokens", "240")
    assert call(monkeypatch, "look.py", *words, "--text", TEXT, "--svg", "look.svg") == 0
    lit = [e for e in ElementTree.parse("look.svg").iter() if e.get("class") == "lit"]
    assert len(lit) == 3  # top_k
    assert call(monkeypatch, "look.py", *words, "--tables") == 0
    out = capsys.readouterr().out
    assert "| silenced | head 1 | head 2 |" in out and "| none: memory off |" in out


def test_a_model_without_memory(folder, monkeypatch, capsys):
    assert call(monkeypatch, "look.py", folder / "base.pt") == 2
    assert capsys.readouterr().err.endswith("base.pt has no memory to look into\n")


# ---- In a browser --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    for flag in f"{flags} disable-background-networking disable-component-update".split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def open_page(browser, path, address="", width=1200, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get(f"{path.as_uri()}{address}")


def hover(browser, place):
    from selenium.webdriver import ActionChains

    letter = browser.find_element("css selector", f"[data-place='{place}']")
    ActionChains(browser).move_to_element(letter).perform()


def find(browser, selector, attribute):
    return [e.get_attribute(attribute) for e in browser.find_elements("css selector", selector)]


def press(browser, words):
    path = f"//button[normalize-space()='{words}']"
    browser.find_element("xpath", path).click()


def test_a_reader_points_at_letters(browser, page):
    path, data = page
    open_page(browser, path)
    grids = set()
    for place in (3, 20):
        hover(browser, place)
        weights = [float(weight) for weight in find(browser, ".lit", "data-weight")]
        assert len(weights) == 3 and sum(weights) == pytest.approx(1)
        grids.add(tuple(find(browser, ".lit", "data-slot")))

        # What is framed reads the same slot first, and nothing else does.
        slots = unpack(data["models"][0]["blocks"][0]["slots"], "<u2").reshape(-1, 2, 3)
        same = np.flatnonzero(slots[:, 0, 0] == slots[place, 0, 0])
        assert find(browser, ".same", "data-place") == [str(i) for i in same]
    assert len(grids) == 2

    # A busy slot is kept, and its own places are marked.
    kept = data["models"][0]["blocks"][0]["busy"][0]["slot"]
    browser.find_element("css selector", "#busy button").click()
    places = np.flatnonzero((slots[:, :, 0] == kept).any(1))
    assert find(browser, ".kept", "data-place") == [str(i) for i in places]
    assert browser.get_log("browser") == [] and browser.title == "What a memory looks up"


def test_blocks_models_and_a_link(browser, page):
    path, data = page
    open_page(browser, path, "#block=5&head=2&at=18")
    assert find(browser, ".here", "data-place") == ["17"]
    for name, shown in zip(METHOD_OF, data["models"], strict=True):
        press(browser, name)
        assert name in browser.find_element("id", "sum").text
        block = shown["blocks"][1]
        press(browser, str(block["number"]))
        slots = unpack(block["slots"], "<u2").reshape(-1, 2, block["k"])
        assert find(browser, ".lit", "data-slot") == [str(slot) for slot in slots[17, 1]]

    browser.find_element("tag name", "body").send_keys("\ue014")  # the right arrow
    assert find(browser, ".here", "data-place") == ["18"]
    assert browser.get_log("browser") == []


CONTRAST = """
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => {
    const [r, g, b] = rgb.map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    const [r, g, b, alpha = 1] = parse(getComputedStyle(element).backgroundColor);
    const below = alpha < 1 ? ground(element.parentElement) : [0, 0, 0];
    return [r, g, b].map((c, i) => c * alpha + below[i] * (1 - alpha));
  };
  const isText = (node) => node.nodeType === 3 && node.data.trim();
  const all = [...document.querySelectorAll("body :not(script)")]
    .filter((element) => [...element.childNodes].some(isText));
  return Math.min(...all.map((element) => {
    const pair = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  }));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_readable(browser, page, scheme):
    path, _ = page
    open_page(browser, path, width=380, scheme=scheme)
    browser.find_element("css selector", "#busy button").click()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 380

    # Also where the colour is full.
    browser.execute_script("""for (const letter of document.querySelectorAll("#text span"))
        letter.style.setProperty("--strength", 1)""")
    assert browser.execute_script(CONTRAST) >= 4.5
