"""Settings of ``make docs``: Sphinx with MyST (pages), autodoc (the Python reference) and sphinx-click (the command line)."""

from imm.version import __version__

project = "imm"
copyright = "the authors of imm, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"imm {__version__}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_copy_source = False
smartquotes = False  # "--out" stays as it is typed
highlight_language = "text"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page included from the root begins at another level

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give shapes and dtypes, which say more
autodoc_mock_imports = ["diffusers"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp, .go"
