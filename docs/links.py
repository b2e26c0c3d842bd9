"""Where links of the site lead: into the site, into the repository, and to other projects."""

from __future__ import annotations

import functools
import pkgutil
import re
from pathlib import Path

from docutils import nodes
from outside import outside
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = 'https://github.com/kd-jax/kd'


def missing(app, env, node, contnode):
    """Answers Sphinx where a name of Python was not found among the pages.

    A name that is written without its module is looked for in all of kd, and is a link where there
    is one such. What is not found is shown as it is, except for names that begin with kd: these are
    left to Sphinx, for which they are errors.
    """
    if node.get('refdomain') != 'py':
        return None
    target = node['reftarget'].removesuffix('()')
    if url := outside(target):
        return nodes.reference('', '', contnode, refuri=url, internal=False)
    known = env.get_domain('py').objects
    if target.startswith('kd.'):
        # A constant, or what has no docstring of its own, stands on the page of its module.
        while target not in known and _exists(target):
            target = target.rpartition('.')[0]
        return _link(app, node, contnode, target) if target in known else None
    found = {name for name in _by_last(env).get(target, ()) if not known[name].aliased}
    if len(found) == 1 and (target[0].isupper() or node.get('reftype') in ('class', 'exc')):
        return _link(app, node, contnode, found.pop())
    return contnode


def _link(app, node, contnode, name: str):
    place = app.env.get_domain('py').objects[name]
    return make_refnode(app.builder, node['refdoc'], place.docname, place.node_id, contnode, name)


def _exists(name: str) -> bool:
    """Whether a module of kd has something of that name, fields of classes included."""
    owner, _, last = name.rpartition('.')
    try:
        holder = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError, ValueError):
        return False
    return hasattr(holder, last) or last in getattr(holder, '__annotations__', ())


def rewrite(app, docname, source):
    """Leads links that go out of docs/ to where the site has the same, or to the repository."""
    up = '../' * docname.count('/')

    def led(match: re.Match) -> str:
        return f']({place(match[1], up)})'

    source[0] = re.sub(r'\]\(\.\./([^)#]+)\)', led, source[0])


def place(file: str, up: str = '') -> str:
    """Where a file of the checkout is shown, from a page that is below docs/ by `up`."""
    path = Path(file)
    made = f'{up}made'
    if file.startswith('configs/claims/'):
        return f'{made}/claims/{path.stem}.md'
    if file.startswith('configs/') and path.suffix == '.py':
        return f'{made}/recipes/{path.parent.name}/{path.stem}.md'
    if path.suffix == '.ipynb':
        return f'{made}/notebooks/{path.name}'
    if file.startswith('kd/') and path.suffix == '.py':
        module = '.'.join(path.with_suffix('').parts).removesuffix('.__init__')
        return f'{made}/api/{module}.rst'
    if file.startswith('results/'):
        return f'{up}../{file}'
    kind = 'tree' if (ROOT / file).is_dir() else 'blob'
    return f'{REPOSITORY}/{kind}/main/{file}'


def source(module: str, name: str = '') -> str | None:
    """The file of a module in the repository."""
    base = ROOT / module.replace('.', '/')
    file = base / '__init__.py' if base.is_dir() else base.with_suffix('.py')
    return f'{REPOSITORY}/blob/main/{file.relative_to(ROOT)}' if file.is_file() else None


@functools.cache
def _by_last(env) -> dict[str, set[str]]:
    """The objects of kd by the last part of their names; all pages have been read by now."""
    known: dict[str, set[str]] = {}
    for name in env.get_domain('py').objects:
        known.setdefault(name.rpartition('.')[2], set()).add(name)
    return known
