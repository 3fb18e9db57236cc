import re

import pytest
from matplotlib.figure import Figure
from PIL import Image

from statickey.errors import OutputError
from statickey.viz import page, save_png


def figure():
    made = Figure(figsize=(2, 1))
    made.subplots().plot([0, 1])
    return made


def test_a_page_needs_nothing_else_and_escapes_all_words(tmp_path):
    odd = "<b>&'\""
    sections = [
        page.section(odd, page.text(odd), page.note(odd), page.points([(odd, odd)])),
        page.section("", page.table([odd, "n"], [[odd, "1"]]), page.facts({odd: odd}), page.details(odd, odd)),
        page.section("pictures", page.row(page.svg(figure()), page.picture(figure(), odd))),
    ]
    page.write_page(tmp_path / "x.html", odd, sections)
    text = (tmp_path / "x.html").read_text()
    assert odd not in text
    assert text.count("&lt;b&gt;&amp;") == 14
    assert not re.search(r"(src|href)=['\"](?!data:|#)", text)
    assert "<h2></h2>" not in text
    assert text.count("<section>") == 3
    page.write_page(tmp_path / "y.html", odd, sections)
    assert (tmp_path / "y.html").read_text() == text
    assert page.svg(figure()) == page.svg(figure())


def test_nothing_makes_no_box():
    assert page.section("Learning curves", "") == ""
    assert page.section("Learning curves") == ""
    assert page.points([]) == ""
    assert page.row() == ""


def test_tables_scroll_within_a_narrow_page():
    assert page.table(["mixer"], [["ska"]]).startswith("<div class=wide tabindex=0><table>")


def test_a_picture_that_cannot_be_drawn_leaves_its_reason():
    def draw():
        raise ValueError("two\nlines of <b>")

    assert page.drawn("ska", lambda: "picture") == "picture"
    assert page.drawn("ska", draw) == "<p class=note>ska is left out: two lines of &lt;b&gt;.</p>"

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        page.drawn("ska", interrupt)


def test_png_is_written_whole_or_not_at_all(tmp_path):
    save_png(figure(), tmp_path / "folder" / "x.png")
    assert Image.open(tmp_path / "folder" / "x.png").size == (300, 150)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*x\.png"):
        save_png(figure(), tmp_path / "file" / "x.png")
