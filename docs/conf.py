"""How the site is made: `make docs`. What is generated stands in docs/made, which git ignores."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import docstrings  # noqa: E402
import links  # noqa: E402
import site_pages  # noqa: E402

project = 'kd'
author = 'The kd authors'
project_copyright = author
html_title = 'kd'

extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.linkcode', 'myst_nb']
exclude_patterns = [
    '_build',
    'papers.md',
    *(f'made/{name}.md' for name in ('families', 'theorems', 'compiled')),
]

# Docstrings: see docs/docstrings.py.
autodoc_member_order = 'bysource'
autodoc_default_options = {'members': True, 'special-members': '__call__'}
autodoc_inherit_docstrings = False
add_module_names = False
toc_object_entries_show_parents = 'hide'
napoleon_numpy_docstring = False
# 'real, fake: denoisers' are two arguments, which a field of Sphinx cannot be.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [('Attributes', 'params_style')]
maximum_signature_line_length = 88

# A name of kd in a docstring or a page that leads nowhere is an error; see docs/links.py.
nitpicky = True

myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3
nb_execution_mode = 'off'

highlight_language = 'none'

html_theme = 'sphinx_book_theme'
html_theme_options = {
    'repository_url': links.REPOSITORY,
    'path_to_docs': 'docs',
    'use_repository_button': True,
    'show_toc_level': 2,
    'show_navbar_depth': 1,
    'collapse_navbar': True,
    'max_navbar_depth': 2,
    'navigation_with_keys': False,
    'navbar_persistent': [],
}
html_static_path = ['static']
html_css_files = ['kd.css']
html_copy_source = False
html_show_sphinx = False


def linkcode_resolve(domain, info):
    """Where the source of something stands."""
    return links.source(info['module'], info['fullname']) if domain == 'py' else None


def setup(app):
    """Makes the pages, and hangs what is said above into Sphinx."""
    site_pages.write(HERE.parent, HERE / 'made')
    app.connect('autodoc-process-docstring', _docstring, priority=400)
    app.connect('autodoc-process-signature', lambda *told: docstrings.signature(told[3]))
    app.connect('autodoc-skip-member', _skipped)
    app.connect('source-read', links.rewrite)
    app.connect('missing-reference', links.missing)


def _docstring(app, what, name, thing, options, lines):
    lines[:] = docstrings.restructured(lines)


def _skipped(app, what, name, thing, skip, options):
    """Fields of named tuples, which their class tells; what Sphinx skips otherwise."""
    return True if type(thing).__name__ == '_tuplegetter' else None
