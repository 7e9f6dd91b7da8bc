"""Check the shape of the source by its syntax trees: who imports whom, how big things are, what must not be named.

Every check takes modules and returns the faults it found, a line each; `test_structure.py` runs them on the package
and, to see that they can fail, on bad snippets.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "headrace"
LOWEST = {"core", "options", "meter"}
LEVELS = [
    {"", "__main__"},
    {"cli"},
    {"server"},
    {"job", "judge"},
    {"plan"},
    {"llm"},
    {"engine"},
    {"schedule", "model"},
    {"quant", "cache", "checkpoint"},
    {"kernels"},
    LOWEST,
]
LEAVES = {"core": set(), "options": {"core"}, "meter": {"core", "options"}}
NEVER = {("model", "checkpoint")}
EXCEPT = {("model", "checkpoint.base")}
OPTIONAL = {"huggingface_hub", "matplotlib", "opentelemetry", "ray", "triton"}
WITHOUT_TORCH = ("core", "options", "schedule", "cache.layout", "cache.blocks", "cache.prefix", "cache.ledger")
TENSORS = {"torch", "numpy", "jax"}

FILE_LINES, CORE_LINES, FUNCTION_LINES, PARAMETERS, ATTRIBUTES = 300, 200, 50, 7, 12

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported name, as a dotted path; `lazy` if it stands in a function, `typing` if only type checkers see it."""

    target: str
    line: int
    lazy: bool
    typing: bool


@dataclass(frozen=True)
class Module:
    """A module's dotted name below the package ("" is the package itself) and its text."""

    name: str
    text: str
    package: bool = False
    known: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def imports(self) -> list[Import]:
        return list(find_imports(self.tree))

    @property
    def may_be_lazy(self) -> bool:
        return self.package or self.room in ("cli", "__main__")


def find_imports(node: ast.AST, lazy: bool = False, typing: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            yield from (Import(f"{base}.{alias.name}", child.lineno, lazy, typing) for alias in child.names)
        else:
            checked = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            yield from find_imports(child, lazy or isinstance(child, Function), typing or checked)


def read_package(root: Path) -> list[Module]:
    """Every module under the package's folder."""
    paths = sorted(root.rglob("*.py"))
    parts = [path.relative_to(root).with_suffix("").parts for path in paths]
    names = [".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts]
    return [
        Module(name, path.read_text(), path.name == "__init__.py", frozenset(names))
        for name, path in zip(names, paths, strict=True)
    ]


def own_target(found: Import, known: Iterable[str]) -> str | None:
    """The module of this package that an import names (its longest known prefix), or None; the version is no module."""
    if found.target.split(".")[0] != PACKAGE or found.target == f"{PACKAGE}.__version__":
        return None
    name = found.target.removeprefix(PACKAGE).removeprefix(".")
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def level(room: str) -> int:
    return next((depth for depth, rooms in enumerate(LEVELS) if room in rooms), -1)


def may_import(module: Module, target: str) -> bool:
    room, other = module.room, target.split(".")[0]
    if room == other or (room, target) in EXCEPT:
        return True
    if (room, other) in NEVER:
        return False
    if room in LEAVES:
        return other in LEAVES[room]
    return level(room) < level(other)


def check_directions(module: Module) -> list[str]:
    """Imports that go up or sideways, are relative, or hide in a function."""
    faults = [f"{module.name}: room {module.room!r} is not in the design"] if level(module.room) < 0 else []
    for found in module.imports:
        place = f"{module.name}:{found.line}"
        if found.target.startswith("."):
            faults.append(f"{place}: relative import")
        target = own_target(found, module.known)
        if target is not None and not may_import(module, target):
            faults.append(f"{place}: {module.name or PACKAGE} must not import {target or PACKAGE}")
        if found.lazy and not module.may_be_lazy and found.target.split(".")[0] not in OPTIONAL:
            faults.append(f"{place}: import of {found.target} inside a function")
    return faults


def import_graph(modules: Iterable[Module], loading: bool = False) -> dict[str, set[str]]:
    """Module to the modules that it imports. With `loading`, to those that run when it is loaded: packages around
    them too, imports for type checkers not."""
    graph: dict[str, set[str]] = {}
    for module in modules:
        wanted = [found for found in module.imports if not (found.lazy and module.may_be_lazy)]
        targets = {own_target(found, module.known) for found in wanted if not (loading and found.typing)}
        names = {target for target in targets if target is not None}
        if loading:
            names |= {around for name in (*names, module.name) for around in packages(name)}
        graph[module.name] = names - {module.name}
    return graph


def packages(name: str) -> list[str]:
    """The packages around a module, outermost (the package itself, "") first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def check_cycles(modules: Iterable[Module]) -> list[str]:
    """Modules that reach themselves through imports."""
    graph = import_graph(modules)
    return [f"{name} imports itself through {reached}" for name in graph if name in (reached := reach(graph, name))]


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def without_torch(name: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in WITHOUT_TORCH)


def check_tensors(modules: Iterable[Module]) -> list[str]:
    """Modules that must do without a tensor library but load one, themselves or through what they import."""
    modules = list(modules)
    graph = import_graph(modules, loading=True)
    loads = {
        module.name
        for module in modules
        for found in module.imports
        if found.target.split(".")[0] in TENSORS and not (found.lazy and module.may_be_lazy) and not found.typing
    }
    return [
        f"{module.name} loads a tensor library through {culprit or PACKAGE}"
        for module in modules
        if without_torch(module.name)
        for culprit in sorted(({module.name} | reach(graph, module.name)) & loads)
    ]


def functions(module: Module) -> Iterator[Function]:
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def parameters(node: Function) -> list[ast.arg]:
    """All parameters but self and cls."""
    spec = node.args
    every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    return [arg for arg in every if arg.arg not in ("self", "cls")]


def check_sizes(module: Module) -> list[str]:
    """Files, functions, parameter lists and classes beyond the budget."""
    lines, limit = len(module.text.splitlines()), CORE_LINES if module.name == "core" else FILE_LINES
    faults = [f"{module.name}: {lines} lines, at most {limit}"] if lines > limit else []
    for node in functions(module):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            faults.append(f"{module.name}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}")
        if len(parameters(node)) > PARAMETERS:
            faults.append(f"{module.name}:{node.lineno}: {node.name} has {len(parameters(node))} parameters")
    for record in ast.walk(module.tree):
        if isinstance(record, ast.ClassDef) and not is_frozen(record):
            count = len(attributes(record))
            if count > ATTRIBUTES:
                faults.append(f"{module.name}:{record.lineno}: {record.name} has {count} attributes")
    return faults


def is_frozen(node: ast.ClassDef) -> bool:
    """Frozen dataclasses and structs, named tuples and protocols: records without a life of their own."""
    bases = {ast.unparse(base) for base in node.bases}
    switches = [
        *node.keywords,
        *(word for call in node.decorator_list if isinstance(call, ast.Call) for word in call.keywords),
    ]
    frozen = any(word.arg == "frozen" and ast.unparse(word.value) == "True" for word in switches)
    return frozen or bool(bases & {"NamedTuple", "Protocol", "TypedDict"})


def attributes(node: ast.ClassDef) -> set[str]:
    """Instance attributes: what is assigned to self anywhere in the class, and annotated fields."""
    names = {
        child.target.id
        for child in node.body
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
    }
    stored = (
        child for child in ast.walk(node) if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store)
    )
    return names | {child.attr for child in stored if isinstance(child.value, ast.Name) and child.value.id == "self"}


def check_types(module: Module) -> list[str]:
    """Functions with a parameter or a result that says no type."""
    return [
        f"{module.name}:{node.lineno}: {node.name} is not fully annotated"
        for node in functions(module)
        if node.returns is None or any(arg.annotation is None for arg in parameters(node))
    ]


def check_forbidden(module: Module) -> list[str]:
    """The environment, and pickle in any form."""
    dotted = [(ast.unparse(node), node.lineno) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    named = dotted + [(found.target, found.line) for found in module.imports]
    bad = ("os.environ", "os.getenv", "os.putenv", "torch.load", "pickle", "cloudpickle", "dill", "marshal", "shelve")
    return [
        f"{module.name}:{line}: {name} is not allowed"
        for name, line in named
        if any(name == word or name.startswith(f"{word}.") for word in bad)
    ]
