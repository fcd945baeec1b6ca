"""How Sphinx makes the report's pages: executed notebooks as they are, equations as MathML, nothing
that needs a network.
"""
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

project = "Hierarchical fusion"
extensions = ["myst_nb"]
exclude_patterns = ["*.jinja"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["study.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # equations in what notebooks print
nb_number_source_lines = False
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3


def inline(self, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block(self, node: nodes.math_block) -> None:
    formula, _, tag = node.astext().partition(r"\tag{")  # stands last where there is one
    number = f'<span class="eqno">({tag.strip().rstrip("}")})</span>' if tag else ""
    equation = convert(formula.strip(), display="block")
    self.body.append(f'<div class="math" tabindex="0">{number}{equation}</div>')
    raise nodes.SkipNode


def open_to_keyboards(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """What scrolls can be reached by keys, and headings of the navigation have a level."""
    body = context.get("body", "").replace("<pre>", '<pre tabindex="0">')
    for kind in ("output text_html", "table-wrapper colwidths-auto docutils container"):
        body = body.replace(f'class="{kind}"', f'class="{kind}" tabindex="0"')
    context["body"] = body
    tree = context.get("furo_navigation_tree", "")
    tree = tree.replace('role="heading"', 'role="heading" aria-level="2"')
    context["furo_navigation_tree"] = tree


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("html-page-context", open_to_keyboards, priority=900)  # after the theme
