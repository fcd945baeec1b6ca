"""The report's pages, before a browser sees them: captions, links, what an executed notebook
becomes.
"""
import nbformat
import pytest

from commands.site import captions_of, prepare, site_links

PICTURE = {"output_type": "display_data", "data": {"image/png": "AA=="}, "metadata": {}}


def said(text: str) -> dict:
    return {"output_type": "display_data", "data": {"text/markdown": text}, "metadata": {}}


def book(*cells: tuple) -> nbformat.NotebookNode:
    """A notebook of (source, outputs), or of a text alone for Markdown."""
    made = []
    for cell in cells:
        if isinstance(cell, str):
            made.append(nbformat.v4.new_markdown_cell(cell))
        else:
            made.append(nbformat.v4.new_code_cell(cell[0], outputs=nbformat.from_dict(cell[1])))
    return nbformat.v4.new_notebook(cells=made)


@pytest.mark.parametrize("cells, captions", [
    ([("plot()", [PICTURE]), ("h.caption('x')", [said("*What it\nshows.*")])],
     ["What it shows.", ""]),
    ([("plot(); h.caption('x')", [PICTURE, said("*In one cell.*")]), "*other words* and more"],
     ["In one cell.", ""]),
    ([("plot()", [PICTURE]), "*By hand.*\n\n## Next"], ["By hand.", ""]),
    ([("plot()", [PICTURE]), "**Bold** is no caption"], ["", ""]),
    ([("print(1)", []), ("h.caption('x')", [said("*Of nothing.*")])], ["", ""])])
def test_a_figure_has_the_caption_that_follows_it(cells, captions):
    assert captions_of(book(*cells)) == captions


def test_a_page_has_alternative_texts_and_no_code_of_captions():
    page = prepare(book(("plot()", [PICTURE]), ("h.caption('x')", [said("*Shown.*")]),
                        "See [there](../README.md), [08](08_result_tables.ipynb), "
                        "[Z](../docs/own_fusion.md)."), ["08_result_tables"])
    assert page.cells[0].metadata["mystnb"] == {"image": {"alt": "Shown."}}
    assert page.cells[1].metadata["tags"] == ["remove-input"]
    assert page.cells[2].source == ("See [there](../about.md), [08](08_result_tables.ipynb), "
                                    "[Z](../own_fusion.md).")


def test_a_finished_progress_line_leaves_nothing_on_a_page():
    page = prepare(book(("work()", [said(""), said("*Result.*"), said("")])), [])
    assert [output["data"]["text/markdown"] for output in page.cells[0].outputs] == ["*Result.*"]


def test_links_of_the_repository_are_links_of_the_site():
    text = ("[a](notebooks/07_x.ipynb) [b](data/README.md) [c](figures/f.png) [d](https://x.org) "
            "[e](docs/gpus.md)")
    assert site_links(text, ["90-10-seed0/07_x"]) == (
        "[a](90-10-seed0/07_x.ipynb) [b](data.md) [c](figures/f.png) [d](https://x.org) "
        "[e](gpus.md)")


def test_a_page_that_is_not_there_is_no_link():
    """Of a study that is half done the next notebook is words."""
    page = prepare(book("**Next** [08  Tables](08_x.ipynb), [07](07_x.ipynb)"), ["07_x"])
    assert page.cells[0].source == "**Next** 08  Tables, [07](07_x.ipynb)"
    assert site_links("[07](notebooks/07_x.ipynb) [01](../notebooks/01_x.ipynb)", ["a/01_x"]) == (
        "07 [01](a/01_x.ipynb)")
