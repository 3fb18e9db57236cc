import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from statickey.cli import main
from statickey.errors import StaticKeyError, UnknownNameError
from statickey.summary import OURS, PEERS, READING, summary


def shown(*args, **kwargs):
    console = Console(file=io.StringIO(), width=160)
    figures = summary(*args, console=console, **kwargs)
    return figures, console.file.getvalue()


def test_table_csv_and_markdown(tmp_path):
    models = ["skaformer_nano", "cskaformer_s18", "fcska_lsa*", "skaformer_nano=sepconv,sepconv,ska,mhsa", "resnet18"]
    figures, text = shown(models, csv=tmp_path / "t.csv", markdown=tmp_path / "t.md")
    labels = [*models[:2], "fcska_lsa_vit_small_patch4_32", *models[3:]]
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    page = (tmp_path / "t.md").read_text()
    assert [row["model"] for row in rows] == labels
    assert [int(row["macs"]) for row in rows] == [figure.macs for figure in figures]
    assert "28 M / ≠ 4.1 G" in text
    assert "| cskaformer_s18 | 3x224x224 | 28.98 | 6.399 |" in page
    assert "≠ cskaformer_s18: GMACs: published 4.1, ours 6.40" in page
    assert all(label in text and label in page for label in labels)
    assert int(rows[3]["macs"]) != int(rows[0]["macs"])


def test_another_image_size_for_models_that_take_none():
    figures, _ = shown(["caformer_s18", "skaformer_s18=sepconv,sepconv,mhsa,mhsa", "resnet18"], img_size=160)
    assert [figure.input_size for figure in figures] == [(3, 160, 160)] * 3
    assert figures[0].macs == figures[1].macs


def test_default_is_every_name_of_ours_and_some_peers():
    assert len(OURS) == len(set(OURS)) == 37
    assert not set(OURS) & set(PEERS)


def test_the_page_in_the_docs_is_up_to_date(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert all(f"| {name} |" in page for name in [*OURS, *PEERS])
    shown(["skaformer_s18", "cskaformer_nano", "fcska_vit_tiny_patch16_224"], markdown=tmp_path / "t.md")
    fresh = (tmp_path / "t.md").read_text()
    assert READING in page
    assert all(line in page for line in fresh.splitlines() if line.startswith(("|", "- ")))


def test_command(capsys):
    assert main(["summary", "skaformer_nano", "--img-size", "64"]) == 0
    assert "3x64x64" in capsys.readouterr().out


WRONG = [
    (["ska_vit_tiny_patch16_22"], UnknownNameError, "did you mean ska_vit_tiny_patch16_224"),
    (["nothing_*"], UnknownNameError, r"no model matches 'nothing_\*'"),
    (["vit_tiny_patch16_224=ska,ska"], StaticKeyError, "need a .*former.* model"),
    (["skaformer_s18=ska,ska"], StaticKeyError, "one name per stage"),
    (["skaformer_s18=ska,sk,ska,ska"], UnknownNameError, "unknown mixer 'sk'"),
]


@pytest.mark.parametrize(("models", "error", "message"), WRONG)
def test_refuses(models, error, message, capsys):
    with pytest.raises(error, match=message):
        shown(models)
    assert main(["summary", *models]) == 2
    assert capsys.readouterr().err.count("\n") == 1
