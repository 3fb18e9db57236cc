"""A trained network in files for other programs."""

import io
import json
import shutil
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
from statickey.export import export_run
from statickey.export import main as module
from statickey.tasks import (
    ClassificationRecipe,
    Machine,
    ModelCard,
    convert_run,
    load_model,
    task_named,
    train,
    write_model,
)

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


def pictures(folder, number):
    folder.mkdir()
    for i in range(number):
        Image.effect_noise((40, 36), 60 + 10 * i).save(folder / f"{i}.png")
    return folder


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


def products(path):
    """Products of a graph by whether both operands, one or none are in int8."""
    nodes = onnx.load(str(path)).graph.node
    dequantised = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    kinds = [sum(name in dequantised for name in node.input[:2]) for node in nodes if node.op_type == "MatMul"]
    return [kinds.count(number) for number in (2, 1, 0)]


def test_static_keys_are_in_int8(runs, tmp_path):
    (made,) = export(runs / "cska", tmp_path / "out", formats=["int8"], max_drop=5)
    # two blocks of four linear layers and of keys for two heads; softmax times value stays in float32
    assert products(tmp_path / "out" / "model_int8.onnx") == [2 * (4 + 2), 0, 2]
    assert 1e-4 < made.difference < 0.1
    assert made.loss.images == "360 test images"
    assert made.loss.network_score == json.loads((runs / "cska" / "run.json").read_text())["accuracy"]
    assert made.loss.points == made.loss.network_score - made.loss.score
    model, card = load_model(runs / "cska")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model_int8.onnx"))
    images = digits(7, card)
    (said,) = session.run(None, {"images": images.numpy()})
    wanted = model(images).detach().numpy()
    assert 0 < abs(said - wanted).max() < 0.2 * abs(wanted).max()
    assert "statickey" in {each.key for each in onnx.load(str(tmp_path / "out" / "model_int8.onnx")).metadata_props}
    (report,) = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["loss"]["points"] == made.loss.points


def test_int8_that_loses_too_much_is_not_kept(runs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(module, "write_int8", lambda *args: lambda x: torch.eye(10)[torch.full((len(x),), 3)])
    with pytest.raises(StaticKeyError, match=r"lost [\d.]+ points on 360 test images \(at most 0\.5\) .* not kept"):
        export(runs / "mhsa", out, formats=["int8"], num_images=4)
    folder = pictures(tmp_path / "images", 5)
    with pytest.raises(StaticKeyError, match=r"lost 100\.00 points on 2 images without labels"):
        export(runs / "mhsa", out, formats=["int8"], data=str(folder))
    assert list(out.iterdir()) == []
    other = {**json.loads((runs / "mhsa" / "config.json").read_text()), "label_names": list("abcdefghij")}
    shutil.copytree(runs / "mhsa", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="class 'a' of the network is '0' in digits"):
        export(tmp_path / "other", out, formats=["int8"], num_images=4)
    with pytest.raises(StaticKeyError, match="calibrated on an image and measured on another"):
        export(runs / "mhsa", out, formats=["int8"], data=str(folder), num_images=1)


def test_without_labels_what_is_said_is_compared(runs, tmp_path, monkeypatch):
    model, _ = load_model(runs / "mhsa")
    seen = []

    def write(place, subject, opset):
        seen.append(len(subject.images))
        (place / "model_int8.onnx").touch()
        return model

    monkeypatch.setattr(module, "write_int8", write)
    (made,) = export(runs / "mhsa", tmp_path / "out", formats=["int8"], data=str(pictures(tmp_path / "images", 5)))
    assert seen == [3]
    assert (made.loss.points, made.loss.images, made.loss.score) == (0, "2 images without labels", None)


def test_what_is_another_function_is_not_kept(runs, tmp_path, monkeypatch):
    model, _ = load_model(runs / "mhsa")
    monkeypatch.setattr(module, "write_torch", lambda *args: lambda x: model(x) * 1.01)
    with pytest.raises(StaticKeyError, match=r"model\.pt2 is 1\.0e-02 from the network on 4 images .* was not kept"):
        export(runs / "mhsa", tmp_path / "out", formats=["torch"], num_images=4)
    assert list((tmp_path / "out").iterdir()) == []


def test_from_the_command_line(runs, tmp_path, capsys):
    images = pictures(tmp_path / "images", 3)
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
    with pytest.raises(StaticKeyError, match="must name at least one of onnx, int8, torch, hub, each once"):
        export(runs / "mhsa", out, formats=[])
    with pytest.raises(StaticKeyError, match="formats"):
        export(runs / "mhsa", out, formats=["tflite"])
    with pytest.raises(StaticKeyError, match="max_drop=-1 must be points, from 0 to 100"):
        export(runs / "mhsa", out, formats=["int8"], max_drop=-1)
    with pytest.raises(StaticKeyError, match="num_images=0 must be a positive integer"):
        export(runs / "mhsa", out, num_images=0)
    with pytest.raises(OutputError, match="'nowhere' is neither the folder of a run nor a model's name"):
        export("nowhere", out)
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(StaticKeyError, match=r"ONNX needs onnxscript: pip install 'statickey\[export\]'"):
        export(runs / "mhsa", out)
    assert not out.exists()


def test_exporters_that_fail_are_explained(runs, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(module, "write_torch", broken)
    with pytest.raises(
        StaticKeyError, match=r"^model\.pt2 cannot be made \(no such operator\); try another of --form"
    ):
        export(runs / "mhsa", tmp_path / "out", formats=["torch"], num_images=2)


def test_time_of_the_compiled_network(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    (made,) = export(runs / "mhsa", tmp_path / "out", formats=["hub"], num_images=2, compiled=True)
    assert made.compiled_milliseconds > 0

    def broken(model):
        def run(x):
            raise RuntimeError("no compiler\nat all")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(StaticKeyError, match=r"torch\.compile fails here \(no compiler\); leave out --compiled"):
        module._compiled(torch.nn.Identity(), torch.zeros(1))


@pytest.fixture
def segmenter(tmp_path):
    """Folder of a segmenter with keys for images of 32 pixels."""
    settings = {"decoder": "segformer", "decoder_channels": 16, "window": None, "img_size": None, "off_grid": "pool"}
    card = ModelCard(
        architecture="small_vit",
        mixer="ska",
        model_args={"embed_dim": 16, "depth": 1, "num_heads": 2},
        img_size=32,
        in_chans=3,
        class_names=("sky", "sea", "sand"),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        task="segment",
        task_args=settings,
    )
    write_model(tmp_path / "run", "last", task_named("segment").rebuild(card), card)
    return tmp_path / "run"


def test_segmenters_at_another_size_than_that_of_their_keys(segmenter, tmp_path):
    """Values are averaged there over the cells of the keys, whose sizes are a mask of one row for all queries."""
    folder = str(pictures(tmp_path / "images", 3))
    (made,) = export(segmenter, tmp_path / "out", data=folder, img_size=48)
    assert made.difference < 1e-5
    model, _ = load_model(segmenter)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    images = torch.randn(3, 3, 48, 48)
    (said,) = session.run(None, {"images": images.numpy()})
    assert said.shape == (3, 3, 48, 48)
    np.testing.assert_allclose(said, model(images).detach(), atol=1e-4)


def test_what_is_not_for_a_task_is_refused(runs, segmenter, tmp_path, monkeypatch):
    with pytest.raises(StaticKeyError, match="is of task segment; --formats int8 hub: classifiers only"):
        export(segmenter, tmp_path / "out", formats=["int8", "hub"])
    model, card = load_model(runs / "mhsa")
    card = replace(card, task="detect")
    monkeypatch.setattr("statickey.tasks.loading.load_model", lambda *args, **options: (model, card))
    with pytest.raises(StaticKeyError, match="is of task detect; classifiers and segmenters are exported"):
        export(runs / "mhsa", tmp_path / "out")
    assert not (tmp_path / "out").exists()
