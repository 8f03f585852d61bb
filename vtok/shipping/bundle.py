"""One Python file from a family: its Model and Config with everything they use of vtok, and nothing else.

    family module --imports--> vtok modules --what Model and Config reach--> definitions, in dependency order --> text

Works on the syntax tree and copies source text, so comments and docstrings stay. What only training uses (the
Objective, losses, discriminators) is not reached from Model and therefore left out. An optional import (`try: ...
except ImportError:`) of a package that an export may not have becomes its fallback.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

ALLOWED = ("torch", "einops", "transformers", "safetensors", "numpy")  # what a bundle may import, and what Python has


class BundleError(ValueError):
    """A family that cannot be written as one file; the message says which line is in the way."""


@dataclass
class _Module:
    """One module of the closure: its source, its top-level statements by the names they bind, and its imports."""

    name: str
    source: str
    path: str
    package: str
    body: list[ast.stmt]
    binds: dict[str, list[int]] = field(default_factory=dict)  # name -> statements that bind it
    internal: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # alias -> (module, name or None: itself)
    external: dict[str, list[str]] = field(default_factory=dict)  # alias -> import statements


def bundle(roots: Iterable[tuple[str, Iterable[str]]], *, allowed: Iterable[str] = ALLOWED) -> str:
    """The source of one file that defines some names as their modules do.

    Args:
        roots: (module name, names in it) to define; a later entry's names give way where two modules clash. Modules of
            these top-level packages and of vtok are copied in, as far as they are used.
        allowed: packages, besides Python's own, that the file may import.
    Raises: BundleError for an import outside `allowed` that is used, for names that clash, for `import *`.
    """
    roots = [(module, tuple(names)) for module, names in roots]
    packages = {"vtok", *(module.partition(".")[0] for module, _ in roots)}
    closure = _Closure(packages, set(allowed) | set(sys.stdlib_module_names), [module for module, _ in roots])
    for module, names in roots:
        for name in names:
            closure.need(module, name)
    return closure.text()


class _Closure:
    def __init__(self, packages: set[str], allowed: set[str], first: list[str]) -> None:
        self.packages, self.allowed, self.first = packages, allowed, first
        self.modules: dict[str, _Module] = {}
        self.used: dict[str, set[int]] = {}  # module -> its statements that are kept
        self.order: list[str] = []
        self.external: dict[str, set[str]] = {}  # alias -> import statements

    def module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _read(name, self)
            self.used[name] = set()
        return self.modules[name]

    def is_internal(self, module: str) -> bool:
        return module.partition(".")[0] in self.packages

    # ---- reachability ----------------------------------------------------------------------------------------------

    def need(self, module_name: str, name: str) -> None:
        """Keep what binds `name` at the top of a module, and all that it uses."""
        module = self.module(module_name)
        if name in module.internal:
            target, attribute = module.internal[name]
            if attribute is not None:
                self.need(target, attribute)
            else:
                self._place(target)
            return
        if name in module.external:
            self._need_external(module, name)
            return
        if name not in module.binds:
            if name in vars(builtins) or name in ("__name__", "__file__"):
                return
            raise BundleError(f"{module.path}: {name} is used but not defined at the top of {module_name}")
        for index in module.binds[name]:
            if index in self.used[module_name]:
                continue
            self.used[module_name].add(index)
            for used in _uses(module.body[index], module):
                self.need(module_name, used)
            for used_module, attribute in _attributes(module.body[index], module):
                self.need(used_module, attribute)
        self._place(module_name)

    def _need_external(self, module: _Module, alias: str) -> None:
        statements = self.external.setdefault(alias, set())
        statements.update(module.external[alias])
        for statement in module.external[alias]:
            self.check_import(ast.parse(statement).body[0], statement, module.path)
        plain = all(s == f"import {alias}" or s.startswith(f"import {alias}.") for s in statements)
        if len(statements) > 1 and not plain:
            raise BundleError(f"{module.path}: {alias} means different things: {', '.join(sorted(statements))}")

    def check_import(self, node: ast.stmt, text: str, where: str) -> None:
        """Raises: BundleError for an import that an export may not make."""
        assert isinstance(node, (ast.Import, ast.ImportFrom))
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        if not {m.partition(".")[0] for m in modules} <= self.allowed:
            raise BundleError(
                f"{where}: {text!r} is needed by the model, but an export may only import {', '.join(ALLOWED)}; move "
                "it to the Objective, or into try/except ImportError with a fallback"
            )

    def _place(self, name: str) -> None:
        """Put a module after every module it took something from (called when all of that is placed)."""
        if name not in self.order and name in self.modules:
            self.order.append(name)

    # ---- text ------------------------------------------------------------------------------------------------------

    def text(self) -> str:
        order = self._sorted()
        names = self._new_names(order)
        parts = []
        for name in order:
            module = self.modules[name]
            rewriter = _Rewriter(module, names, self)
            kept = [rewriter.text(module.body[i]) for i in sorted(self.used[name])]
            kept = [text for text in kept if text.strip()]
            if kept:
                parts.append(f"# From {name}\n\n" + "\n\n\n".join(kept))
        imports = sorted(set().union(*self.external.values()), key=lambda s: (s.startswith("from"), s))
        return "\n".join(imports) + "\n\n\n" + "\n\n\n".join(parts) + "\n"

    def _sorted(self) -> list[str]:
        """Modules of the closure, each after those whose names its kept statements use."""
        needs: dict[str, set[str]] = {name: set() for name in self.order}
        for name in self.order:
            module = self.modules[name]
            for index in self.used[name]:
                statement = module.body[index]
                aliases = _uses(statement, module) & set(module.internal)
                needs[name] |= {self._owner(*module.internal[a]) for a in aliases if module.internal[a][1]}
                needs[name] |= {self._owner(m, a) for m, a in _attributes(statement, module)}
            needs[name].discard(name)
        out: list[str] = []

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise BundleError(f"modules import each other in a circle: {' -> '.join([*path, name])}")
            if name not in out:
                for other in sorted(needs.get(name, ())):
                    visit(other, (*path, name))
                out.append(name)

        for name in self.order:
            visit(name, ())
        return out

    def _owner(self, module: str, attribute: str | None) -> str:
        """The module that defines a name, past re-exports."""
        found = self.module(module)
        while attribute is not None and attribute in found.internal:
            module, attribute = found.internal[attribute]
            found = self.module(module)
        return module

    def owner(self, module: str, attribute: str) -> tuple[str, str]:
        """(module that defines a name, its name there), past re-exports and renamed imports."""
        found = self.module(module)
        while attribute in found.internal:
            target, name = found.internal[attribute]
            if name is None:
                raise BundleError(f"{found.path}: {attribute} is a module, not a definition")
            module, attribute = target, name
            found = self.module(module)
        return module, attribute

    def _new_names(self, order: list[str]) -> dict[tuple[str, str], str]:
        """(module, name) -> name in the bundle: its own, unless two modules define the same one."""
        taken: dict[str, str] = {alias: "an import" for alias in self.external}
        hidden = self._hidden()
        out: dict[tuple[str, str], str] = {}
        for name in [*self.first, *(n for n in order if n not in self.first)]:
            module = self.modules[name]
            for bound, where in module.binds.items():
                if not self.used[name] & set(where):
                    continue
                clash = bound in taken or (name, bound) in hidden
                new = f"{bound}_{name.rpartition('.')[2]}" if clash else bound
                if new in taken:
                    raise BundleError(f"{module.path}: {bound} clashes with {taken[new]}")
                taken[new] = name
                out[name, bound] = new
        return out

    def _hidden(self) -> set[tuple[str, str]]:
        """Definitions called by another name (`alias`, `module.name`) where a function has a variable of their own."""
        out = set()
        for name in self.order:
            module = self.modules[name]
            called = {
                alias: {self.owner(target, attribute)}
                for alias, (target, attribute) in module.internal.items()
                if attribute is not None and target in self.modules and attribute != alias
            }
            for index in self.used[name]:
                for node, hidden in _statement(module.body[index]):
                    found: set[tuple[str, str]] = set()
                    if isinstance(node, ast.Name):
                        found = called.get(node.id, set())
                    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                        target, attribute = module.internal.get(node.value.id, ("", ""))
                        if target and attribute is None and node.value.id not in hidden:
                            found = {self.owner(target, node.attr)}
                    out |= {(m, n) for m, n in found if n in hidden}
        return out


def _read(name: str, closure: _Closure) -> _Module:
    loaded = sys.modules.get(name)
    spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec(name)
    path = getattr(loaded, "__file__", None) or (spec.origin if spec else None)
    if not path:
        raise BundleError(f"the source of module {name} is not to be found")
    source = Path(path).read_text(encoding="utf-8")
    is_package = Path(path).name == "__init__.py"
    module = _Module(name, source, path, name if is_package else name.rpartition(".")[0], ast.parse(source).body)
    for index, statement in enumerate(module.body):
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            _note_import(statement, module, closure)
        else:
            for bound in _bound(statement):
                module.binds.setdefault(bound, []).append(index)
    return module


def _note_import(statement: ast.Import | ast.ImportFrom, module: _Module, closure: _Closure) -> None:
    for alias in statement.names:
        bound = alias.asname or alias.name.partition(".")[0]
        if isinstance(statement, ast.Import):
            if closure.is_internal(alias.name):
                if alias.asname is None and "." in alias.name:
                    raise BundleError(
                        f"{module.path}:{statement.lineno}: write `from ... import` for vtok's own modules"
                    )
                module.internal[bound] = (alias.name, None)
            else:
                text = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                module.external.setdefault(bound, []).append(text)
            continue
        target = _absolute(statement, module)
        if target == "__future__":
            continue
        if alias.name == "*":
            raise BundleError(f"{module.path}:{statement.lineno}: `import *` cannot be bundled; name what is used")
        if not closure.is_internal(target):
            name = f" as {alias.asname}" if alias.asname else ""
            module.external.setdefault(bound, []).append(f"from {target} import {alias.name}{name}")
        elif _is_module(f"{target}.{alias.name}"):
            module.internal[bound] = (f"{target}.{alias.name}", None)
        else:
            module.internal[bound] = (target, alias.name)


def _absolute(statement: ast.ImportFrom, module: _Module) -> str:
    if not statement.level:
        return statement.module or ""
    parts = module.package.split(".")
    base = parts[: len(parts) - statement.level + 1]
    return ".".join([*base, *([statement.module] if statement.module else [])])


@lru_cache(maxsize=4096)
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(statement):
        if isinstance(node, (ast.Import, ast.ImportFrom)):  # inside try or if
            names |= {a.asname or a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names


def _uses(statement: ast.stmt, module: _Module) -> set[str]:
    """Names of the module's top that a statement reads, annotations included."""
    top = set(module.binds) | set(module.internal) | set(module.external)
    names = {n.id for n in _walk(statement) if isinstance(n, ast.Name)}
    return names & top - _bound(statement) | {n for n in names & top & _bound(statement) if len(module.binds[n]) > 1}


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """ast.walk without the names that a function binds itself."""
    return (found for found, _ in _statement(node))


@lru_cache(maxsize=4096)
def _statement(node: ast.AST) -> tuple[tuple[ast.AST, frozenset[str]], ...]:
    return tuple(_scoped(node, frozenset()))


def _scoped(node: ast.AST, hidden: frozenset[str]) -> Iterator[tuple[ast.AST, frozenset[str]]]:
    """(node, names that functions around it bind themselves), those names left out."""
    if isinstance(node, ast.Name) and node.id in hidden:
        return
    yield node, hidden
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        outside = [node.args, *getattr(node, "decorator_list", []), *filter(None, [getattr(node, "returns", None)])]
        for part in outside:  # defaults, decorators and annotations belong to the scope around the function
            yield from _scoped(part, hidden)
        inner = hidden | _locals(node)
        for part in node.body if isinstance(node.body, list) else [node.body]:
            yield from _scoped(part, inner)
        return
    for child in ast.iter_child_nodes(node):
        yield from _scoped(child, hidden)


def _locals(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> frozenset[str]:
    """Names that a function binds: its arguments, and what its body assigns, imports or defines."""
    a = function.args
    names = {arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]}
    body = function.body if isinstance(function.body, list) else []
    for node in (n for statement in body for n in ast.walk(statement)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    shared = {n for s in body for d in ast.walk(s) if isinstance(d, (ast.Global, ast.Nonlocal)) for n in d.names}
    return frozenset(names - shared)


def _attributes(statement: ast.stmt, module: _Module) -> set[tuple[str, str]]:
    """(module, name) of every `alias.name` where alias is one of vtok's own modules."""
    return {
        (module.internal[node.value.id][0], node.attr)
        for node in _walk(statement)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and module.internal.get(node.value.id, ("", ""))[1] is None
    }


class _Rewriter:
    """The source text of a statement, with names changed where the bundle calls them otherwise."""

    def __init__(self, module: _Module, names: dict[tuple[str, str], str], closure: _Closure) -> None:
        self.module, self.names, self.closure = module, names, closure
        self.lines = module.source.encode().splitlines(keepends=True)
        self.renamed = {}
        for alias, (target, attribute) in module.internal.items():
            if attribute is not None and target in closure.modules:
                new = names.get(closure.owner(target, attribute), alias)
                self.renamed |= {alias: new} if new != alias else {}
        for bound in module.binds:
            new = names.get((module.name, bound), bound)
            self.renamed |= {bound: new} if new != bound else {}

    def text(self, statement: ast.stmt) -> str:
        if isinstance(statement, ast.Try):
            return self._try(statement)
        edits = list(self._edits(statement))
        start = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        start = self._comments_above(start)
        end = statement.end_lineno or start
        lines = self.lines[start - 1 : end]
        for line, column, stop, new in sorted(edits, reverse=True):
            old = lines[line - start]
            lines[line - start] = old[:column] + new.encode() + old[stop:]
        return b"".join(lines).decode().rstrip()

    def _comments_above(self, line: int) -> int:
        while line > 1 and self.lines[line - 2].startswith(b"#"):
            line -= 1
        return line

    def _try(self, statement: ast.Try) -> str:
        """`try: from x import y / except ImportError: y = None` as its fallback, where x is not to be imported."""
        imports = [n for n in statement.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        tops = {
            (n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name).partition(".")[0] for n in imports
        }
        if not imports or len(imports) != len(statement.body) or len(statement.handlers) != 1:
            raise BundleError(f"{self.module.path}:{statement.lineno}: only `try: import ... except` can be bundled")
        if tops <= self.closure.allowed:
            return b"".join(self.lines[statement.lineno - 1 : statement.end_lineno]).decode().rstrip()
        return "\n".join(ast.unparse(n) for n in statement.handlers[0].body)

    def _edits(self, statement: ast.stmt) -> Iterator[tuple[int, int, int, str]]:
        """(line, first column, last column, new text), columns in bytes."""
        module = self.module
        renamed = self.renamed
        for node, hidden in _statement(statement):
            if isinstance(node, (ast.Import, ast.ImportFrom)):  # inside a function
                self.closure.check_import(node, ast.unparse(node), f"{module.path}:{node.lineno}")
            if isinstance(node, ast.Name) and node.id in renamed:
                assert renamed[node.id] not in hidden, (module.path, node.lineno)
                yield node.lineno, node.col_offset, node.end_col_offset or 0, renamed[node.id]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node is statement and node.name in renamed:
                line = self.lines[node.lineno - 1]
                at = line.index(node.name.encode(), node.col_offset + len("def"))
                yield node.lineno, at, at + len(node.name.encode()), renamed[node.name]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in hidden:
                target, attribute = module.internal.get(node.value.id, ("", ""))
                if target and attribute is None:
                    new = self.names[self.closure.owner(target, node.attr)]
                    assert new not in hidden and node.end_col_offset is not None, (module.path, node.lineno)
                    yield node.lineno, node.col_offset, node.end_col_offset, new
