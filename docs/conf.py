"""Configuration of Sphinx. ``sphinx-build -W docs build/docs`` builds the site."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extension"))

(Path(__file__).parent / "generated").mkdir(exist_ok=True)

project = "lightning_reg"
author = "the lightning_reg authors"
copyright = f"2026, {author}"  # noqa: A001
release = version = installed("lightning-reg")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "cards", "docstrings"]
exclude_patterns = ["extension", "generated"]
suppress_warnings = ["myst.header"]  # pages that include a part of the README begin below its title

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
highlight_language = "text"  # of blocks that name none
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

add_module_names = False
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
napoleon_custom_sections = [("Reference", "References")]
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"lightning_reg {release}"
html_static_path = ["static", "generated"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_show_sourcelink = False
html_copy_source = False
