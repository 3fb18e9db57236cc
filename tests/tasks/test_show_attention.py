"""The command attention: its page, its pictures and its refusals; the page in a real browser."""

import io
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
from PIL import Image
from rich.console import Console

from statickey.cli import main
from statickey.errors import DataError, OutputError, StaticKeyError, UnsupportedHostError
from statickey.tasks import (
    Classification,
    ClassificationRecipe,
    Machine,
    SegmentationRecipe,
    load_model,
    show_attention,
    train,
)
from statickey.tasks import attention as module
from statickey.tasks.weights import ModelCard, write_model
from statickey.viz import Look, capture_maps
from statickey.viz.explorer import PackedMaps, unpack_maps

CPU = Machine(accelerator="cpu")
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2}
RECIPE = ClassificationRecipe(limit=60, epochs=1, batch_size=32, model_args=SMALL)


def card(name, mixer=None, **model_args):
    return ModelCard(
        architecture=name,
        mixer=mixer,
        model_args=SMALL | model_args,
        img_size=32,
        in_chans=3,
        class_names=("a", "b"),
        mean=(0.5,),
        std=(0.5,),
        streamed=True,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A comparison, a network that no run made, with a class token, and photos."""
    folder = tmp_path_factory.mktemp("attention")
    for mixer in ("ska", "mhsa"):
        out = folder / "compared" / "runs" / f"{mixer}-seed0"
        train(RECIPE, mixer=mixer, out=str(out), machine=CPU, console=Console(file=io.StringIO()))
    (folder / "compared" / "config.yaml").write_text("mixers: [ska, mhsa]\n")
    tokens = card("vit_tiny_patch16_224", "ska", patch_size=8)
    write_model(folder / "tokens", "last", tokens.build(), tokens)
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 50, 3), np.uint8)
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(folder / "photos" / f"{i}.png")
    return folder


def show(*sources, out, **options):
    """The page's data, and all that was written."""
    console = Console(file=io.StringIO(), width=200)
    written = show_attention(
        [str(each) for each in sources], out=str(out), accelerator="cpu", console=console, **options
    )
    page = written[0].read_text()
    return json.loads(re.search(r"id=attention-data>(.*?)</script>", page, re.S)[1]), written


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of the time."""
    monkeypatch.setattr(Look, "figures", lambda self: iter(()))


def numbers(model, layer, image):
    """Maps and steps of a layer, as the page reads them."""
    view = model["views"]["attention"][layer]
    maps = view["maps"][image]
    packed = PackedMaps(maps["heads"], tuple(maps["queries"]), tuple(maps["keys"]), maps["low"], maps["data"])
    return unpack_maps(packed, view["prefix"])


def test_images(number):
    data = Classification().read_data(RECIPE)
    return Classification().examples(data, Classification().data_module(RECIPE, data, 0), "test", number)[1]


test_images.__test__ = False


def test_a_comparison_side_by_side_on_its_test_images(place, tmp_path):
    data, written = show(place / "compared", out=tmp_path / "out", num_images=2)
    assert [model["name"] for model in data["models"]] == ["ska", "mhsa"]
    assert data["captions"] == ["0", "1"]
    assert len(data["pictures"]) == 2
    for model in data["models"]:
        network, _ = load_model(place / "compared" / "runs" / f"{model['name']}-seed0")
        maps = list(capture_maps(network, test_images(2)).values())
        for layer, image in ((0, 0), (1, 1)):
            values, steps = numbers(model, layer, image)
            wanted = maps[layer].weights[image].numpy()
            assert (np.abs(values - wanted) <= steps[..., None] / 2 + 1e-6).all()
    names = [path.name for path in written]
    assert names[:3] == ["attention.html", "distances.csv", "distances.png"]
    assert {"mhsa-overlay-2.png", "mhsa-heads.png", "ska-keys.png", "ska-similarity.png"} <= set(names)
    assert "mhsa-keys.png" not in names
    assert all(path.is_file() for path in written)
    rows = (tmp_path / "out" / "distances.csv").read_text().splitlines()
    assert rows[0] == "model,layer,head,distance"
    assert len(rows) == 1 + 2 * 2 * 2
    assert written[0].stat().st_size < 200_000


def test_files_and_networks_of_other_sizes(place, tmp_path, no_pictures):
    photos = str(place / "photos")
    data, _ = show(
        place / "tokens", place / "tokens", out=tmp_path / "out", images=[photos], num_images=2, layers="-1"
    )
    assert data["captions"] == ["0.png", "1.png"]
    assert [model["name"] for model in data["models"]] == ["tokens", "tokens (2)"]
    (view,) = data["models"][0]["views"]["attention"]
    assert (view["layer"], view["prefix"], view["maps"][0]["keys"]) == ("blocks.1.attn", 1, [4, 4])
    assert data["models"][0]["prefix"] == ["class token"]
    bigger, _ = show(place / "tokens", out=tmp_path / "bigger", images=[photos], img_size=48)
    assert bigger["models"][0]["views"]["attention"][0]["maps"][2]["keys"] == [6, 6]


def test_a_published_name_beside_a_run(place, tmp_path, monkeypatch, no_pictures):
    def published(name, img_size):
        assert (name, img_size) == ("vit_tiny_patch16_224", None)
        return timm.create_model(name, patch_size=2, img_size=8, in_chans=1, num_classes=2, **SMALL).eval(), told

    told = ModelCard("vit_tiny_patch16_224", None, {}, 8, 1, ("a", "b"), (0.5,), (0.5,), streamed=True)
    monkeypatch.setattr(module, "published_model", published)
    run = place / "compared" / "runs" / "ska-seed0"
    data, _ = show(run, "vit_tiny_patch16_224", out=tmp_path / "out")
    assert [model["name"] for model in data["models"]] == ["ska-seed0", "vit_tiny_patch16_224"]
    assert data["captions"] == ["0", "1", "2", "3"]
    assert len(data["pictures"]) == 4


def test_from_the_command_line(place, tmp_path, capsys, no_pictures):
    out, photos = tmp_path / "out", sorted(map(str, (place / "photos").iterdir()))
    words = ["attention", str(place / "tokens"), "--out", str(out), "--images", *photos[:2], "--layers", "blocks.0"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "attention.html" in shown
    assert "tokens: 1 of 2 layers with 2 heads each: blocks.0.attn" in shown
    assert main(words) == 2
    assert "holds an attention.html already; choose another --out" in capsys.readouterr().err


def test_refusals(place, tmp_path):
    out, photos, tokens = tmp_path / "out", [str(place / "photos")], place / "tokens"
    run = place / "compared" / "runs" / "mhsa-seed0"
    for message, sources, options in (
        ("is neither the folder of a run nor a model's name", ["nowhere"], {}),
        ("no network is given", [], {}),
        ("does not say what it was trained on; give --images or --data", [tokens], {}),
        ("images of digits have 1 channels, .*tokens takes 3; give --images", [tokens], {"data": "digits"}),
        ("images of digits have 1 channels, .*tokens takes 3; give --images", [run, tokens], {}),
        ("no image there; give files", [tokens], {"images": [*photos, str(tmp_path)]}),
        ("no image is given; give files", [tokens], {"images": []}),
        ("cannot read .*weights", [tokens], {"images": [str(tokens / "model.safetensors")]}),
        (
            "layers='blocks.7' matches none of blocks.0.attn, blocks.1.attn of tokens",
            [tokens],
            {"layers": "blocks.7"},
        ),
        ("index 2, but tokens has 2 layers with a map", [tokens], {"layers": "2"}),
        ("num_images=0 must be a positive integer", [tokens], {"num_images": 0}),
        ("max_mb=-1 must be a positive number", [tokens], {"max_mb": -1}),
        ("not even one layer of each model fits", [tokens], {"max_mb": 0.1}),
    ):
        with pytest.raises(StaticKeyError, match=message.replace("weights", "safetensors")):
            show(
                *sources,
                out=out,
                **{"images": None if "channels" in message or "say" in message else photos} | options,
            )
    assert not out.exists()
    with pytest.raises(OutputError, match="out='' must name a folder"):
        show(tokens, out="")


def test_networks_without_maps_are_refused(place, tmp_path):
    photos = [str(place / "photos")]
    convolutions = replace(card("resnet10t"), model_args={})
    write_model(tmp_path / "resnet", "last", convolutions.build(), convolutions)
    with pytest.raises(UnsupportedHostError, match="ResNet"):
        show(tmp_path / "resnet", out=tmp_path / "out", images=photos)
    few = {"embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    windows = replace(card("swin_tiny_patch4_window7_224"), img_size=56, model_args=few)
    write_model(tmp_path / "swin", "last", windows.build(), windows)
    with pytest.raises(StaticKeyError, match="no attention map of whole images in swin"):
        show(tmp_path / "swin", out=tmp_path / "out", images=photos)


def test_detectors_are_refused(place, tmp_path, monkeypatch):
    model, own = load_model(place / "tokens")
    monkeypatch.setattr(module, "load_model", lambda *args, **options: (model, replace(own, task="detect")))
    with pytest.raises(StaticKeyError, match=r"tokens is a detector, .* not shown, as yet"):
        show(place / "tokens", out=tmp_path / "out")


@pytest.mark.slow
def test_segmenters_are_shown(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr("statickey.data.scenes.TEST_SCENES", 2)
    recipe = SegmentationRecipe(
        model="small_vit",
        limit=8,
        decoder_channels=16,
        crop_size=32,
        img_size=40,
        batch_size=4,
        epochs=1,
        model_args=SMALL,
    )
    train(recipe, mixer="ska", out=str(tmp_path / "run"), machine=CPU, console=Console(file=io.StringIO()))
    data, _ = show(tmp_path / "run", out=tmp_path / "out", num_images=2)
    assert data["captions"] == ["image 1", "image 2"]
    assert [view["maps"][1]["keys"] for view in data["models"][0]["views"]["attention"]] == [[8, 8], [8, 8]]


def test_networks_that_learned_from_other_data_need_images(place, tmp_path, monkeypatch):
    real = module.read_result
    monkeypatch.setattr(
        module, "read_result", lambda path: real(path) | ({"data": "cifar10"} if "mhsa" in str(path) else {})
    )
    with pytest.raises(DataError, match="learned from cifar10, digits; give --images or --data"):
        show(place / "compared", out=tmp_path / "out")


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    names = ("chromium", "chromium-headless-shell", "google-chrome")
    found = os.environ.get("STATICKEY_CHROMIUM", next(filter(None, map(shutil.which, names)), None))
    with playwright.sync_playwright() as running:
        if found is None and not os.path.exists(running.chromium.executable_path):  # noqa: PTH110 (text)
            pytest.skip("needs Chromium: playwright install chromium, or set STATICKEY_CHROMIUM to its path")
        chromium = running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_in_a_browser_the_numbers_under_the_pointer_are_the_models(place, tmp_path, browser, no_pictures, phone):
    _, (page_file, *_) = show(place / "compared", out=tmp_path / "out", num_images=3)
    network, _ = load_model(place / "compared" / "runs" / "ska-seed0")
    maps = list(capture_maps(network, test_images(3)).values())
    size = {"width": 390, "height": 844} if phone else {"width": 1280, "height": 900}
    context = browser.new_context(viewport=size, has_touch=phone)
    page, told, asked = context.new_page(), [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    stage = page.get_by_role("application", name="Map of ska")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    grid = 4

    def at(row, column):
        return {"x": (column + 0.5) * box["width"] / grid, "y": (row + 0.5) * box["height"] / grid}

    def check(layer, head, image, query, key):
        weights = maps[layer].weights[image]
        row = weights.mean(dim=0)[query] if head == 0 else weights[head - 1, query]
        page.wait_for_function(
            "([stage, key, query]) => stage.dataset.key === key && stage.dataset.query === query",
            arg=[stage.element_handle(), str(key), str(query)],
        )
        step = float(stage.get_attribute("data-step"))
        assert (stage.get_attribute("data-layer"), stage.get_attribute("data-head")) == (
            f"blocks.{layer}.attn",
            str(head),
        )
        assert abs(float(stage.get_attribute("data-value")) - row[key].item()) <= step / 2 + 1e-6
        reading = page.locator(f"#{stage.get_attribute('aria-describedby')}").inner_text()
        words = reading.replace("\n", " ")
        number = float(re.search(r"To (?:itself|row \d+, column \d+)\s*(\S+) \(", words)[1])
        assert abs(number - row[key].item()) <= step
        assert f"row {query // grid + 1}, column {query % grid + 1}" in words

    if phone:
        stage.tap(position=at(1, 2))
    else:
        stage.hover(position=at(1, 2))
    check(1, 0, 0, 6, 6)
    seen_before = stage.screenshot()
    if phone:
        stage.tap(position=at(3, 0))
    else:
        stage.hover(position=at(3, 0))
    check(1, 0, 0, 12, 12)
    assert stage.screenshot() != seen_before
    stage.focus()
    page.keyboard.press("ArrowUp")
    check(1, 0, 0, 8, 8)
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    check(1, 0, 0, 8, 10)
    page.keyboard.press("Shift+L")
    page.keyboard.press("h")
    page.keyboard.press("h")
    page.keyboard.press("i")
    page.wait_for_function("stage => stage.dataset.head === '2'", arg=stage.element_handle())
    check(0, 2, 1, 8, 10)
    page.get_by_role("button", name="Key similarity").click()
    page.get_by_text("mhsa has no static key.").wait_for()
    page.get_by_role("button", name="Rollout").click()
    page.get_by_role("button", name="Dark page").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    unnamed = (
        "[...document.querySelectorAll('button,input,select,canvas[role],.stage')].filter(e => !e.offsetParent ? 0 : "
    )
    unnamed += "!(e.ariaLabel || e.textContent.trim() || e.closest('label') || e.querySelector('img[alt]'))).length"
    assert page.evaluate(unnamed) == 0
    assert told == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    context.close()
