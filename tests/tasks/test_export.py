"""A trained classifier in files for other programs."""

import io
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from rich.console import Console

from statickey.cli import main
from statickey.errors import DataError, OutputError, StaticKeyError
from statickey.tasks import (
    ClassificationRecipe,
    Machine,
    convert_run,
    export_run,
    load_model,
    train,
)
from statickey.tasks import export as module

CPU = Machine(accelerator="cpu")
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def silent():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs by mixer."""
    place = tmp_path_factory.mktemp("export")
    recipe = ClassificationRecipe(limit=120, epochs=1, batch_size=32, model_args=SMALL)
    for mixer in ("mhsa", "cska"):
        train(recipe, mixer=mixer, out=str(place / mixer), machine=CPU, console=silent())
    return place


def export(run, out, **options):
    return export_run(str(run), out=str(out), console=silent(), **options)


def digits(batch, card):
    images = torch.rand(batch, 1, card.img_size, card.img_size, generator=torch.Generator().manual_seed(1))
    return (images - card.mean[0]) / card.std[0]


@pytest.mark.parametrize(("mixer", "opset"), [("mhsa", 23), ("cska", 20)])
def test_onnx_is_the_network_at_any_batch(runs, tmp_path, mixer, opset):
    (made,) = export(runs / mixer, tmp_path / "out", opset=opset, num_images=5)
    assert (made.format, made.file) == ("onnx", "model.onnx")
    assert 0 <= made.difference < 1e-5
    assert min(made.milliseconds, made.network_milliseconds) > 0
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert [each.version for each in graph.opset_import if each.domain == ""] == [opset]
    fused = sum(node.op_type == "Attention" for node in graph.graph.node)
    assert fused == (2 if opset == 23 else 0)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    model, card = load_model(runs / mixer)
    for batch in (1, 2, 7):
        images = digits(batch, card)
        (said,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(said, model(images).detach().numpy(), atol=1e-5)
    about = json.loads({each.key: each.value for each in graph.metadata_props}["statickey"])
    assert about["label_names"] == list(card.class_names)
    assert about["pretrained_cfg"]["mean"] == list(card.mean)
    assert json.loads((tmp_path / "out" / "export.json").read_text())[0]["difference"] == made.difference


def test_torch_export_and_a_hub_folder_are_the_network(runs, tmp_path):
    made = export(runs / "cska", tmp_path / "out", formats=["torch", "hub"], num_images=3)
    assert [each.file for each in made] == ["model.pt2", "model.safetensors"]
    model, card = load_model(runs / "cska")
    images = digits(5, card)
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(program(images), model(images))
    again, own = load_model(tmp_path / "out")
    torch.testing.assert_close(again(images), model(images))
    assert own == card
    hub = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(hub(images), model(images))
    _, head, text = (tmp_path / "out" / "README.md").read_text().split("---\n")
    accuracy = json.loads((runs / "cska" / "run.json").read_text())["accuracy"]
    (found,) = yaml.safe_load(head)["model-index"][0]["results"][0]["metrics"]
    assert found == {"type": "accuracy", "value": round(accuracy, 2)}
    assert f"Accuracy on 360 test images of digits: {accuracy:.2f} %, after 1 epochs, seed 0." in text
    assert not list((tmp_path / "out").glob(".export-*"))


def test_other_sizes_and_converted_networks(runs, tmp_path):
    args = {"fit": "mean", "fraction": 0.5, "accelerator": "cpu", "num_images": 16}
    convert_run(str(runs / "mhsa"), out=str(tmp_path / "static"), console=silent(), **args)
    (made,) = export(tmp_path / "static", tmp_path / "out", data="digits", img_size=12, num_images=4)
    assert made.difference < 1e-5
    model, _ = load_model(tmp_path / "static", img_size=12)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    images = torch.randn(3, 1, 12, 12)
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], model(images).detach(), atol=1e-5)
    with pytest.raises(DataError, match="does not say what it was trained on; give --data"):
        export(tmp_path / "static", tmp_path / "other")


def test_what_is_another_function_is_not_kept(runs, tmp_path, monkeypatch):
    right = module._onnx

    def wrong(*args):
        run = right(*args)
        return lambda x: run(x) * 1.01

    monkeypatch.setattr(module, "_onnx", wrong)
    with pytest.raises(StaticKeyError, match=r"model\.onnx is 1\.0e-02 from the network on 4 images .* was not kept"):
        export(runs / "mhsa", tmp_path / "out", num_images=4)
    assert list((tmp_path / "out").iterdir()) == []


def test_from_the_command_line(runs, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("L", (9, 9), 80 * i).save(images / f"{i}.png")
    words = ["export", str(runs / "mhsa"), "--out", str(tmp_path / "out"), "--data", str(images), "--formats", "hub"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert "on 3 images" in " ".join(shown.split())
    assert main(words) == 2
    assert "holds a model.safetensors already; choose another --out" in capsys.readouterr().err


def test_refusals(runs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(StaticKeyError, match="opset=17 must be from 18 to 23"):
        export(runs / "mhsa", out, opset=17)
    with pytest.raises(StaticKeyError, match="must name at least one of onnx, torch, hub, each once"):
        export(runs / "mhsa", out, formats=[])
    with pytest.raises(StaticKeyError, match="formats"):
        export(runs / "mhsa", out, formats=["tflite"])
    with pytest.raises(StaticKeyError, match="num_images=0 must be a positive integer"):
        export(runs / "mhsa", out, num_images=0)
    with pytest.raises(OutputError, match="'nowhere' is neither the folder of a run nor a model's name"):
        export("nowhere", out)
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(StaticKeyError, match=r"ONNX needs onnxscript: pip install 'statickey\[export\]'"):
        export(runs / "mhsa", out)
    assert not out.exists()


def test_segmenters_are_refused(runs, tmp_path, monkeypatch):
    model, card = load_model(runs / "mhsa")
    monkeypatch.setattr(module, "load_model", lambda *args, **options: (model, replace(card, task="segment")))
    with pytest.raises(StaticKeyError, match="is of task segment; classifiers are exported, as yet nothing else"):
        export(runs / "mhsa", tmp_path / "out")
