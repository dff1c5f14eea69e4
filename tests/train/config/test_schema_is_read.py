"""No setting is ignored: every field of the schema is read somewhere, by code that holds that very group.

A small type inference over train/, launch/ and kernels/: it knows what a name holds from annotations (parameters,
fields, return types) and from assignments, so that `model.revision` counts only where `model` is a ModelConfig.
"""

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from tunesmith.train.config.config import Config

ROOT = Path(__file__).parents[3]
SCHEMA_FILES = [ROOT / "train/config/config.py", *sorted((ROOT / "train/config/schema").glob("*.py"))]
Reads = set[tuple[str, str]]  # (class, field)


def schema_classes() -> dict[str, set[str]]:
    """Config and its groups, with their fields."""
    groups = [hint for hint in get_type_hints(Config).values() if is_dataclass(hint)]
    return {schema.__name__: {field.name for field in fields(schema)} for schema in [Config, *groups]}


def code_files() -> list[Path]:
    found = [path for folder in ("train", "launch", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if path not in SCHEMA_FILES]


class Types:
    """What is known of the classes and functions of some modules: the class that an attribute or a call gives."""

    def __init__(self, trees: list[ast.Module]) -> None:
        self.attributes: dict[tuple[str, str], str] = {}
        self.functions: dict[str, str] = {}
        self.methods: dict[tuple[str, str], ast.FunctionDef] = {}
        for tree in trees:
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    self._add_class(node)
                elif isinstance(node, ast.FunctionDef) and (name := class_in(node.returns)):
                    self.functions[node.name] = name

    def _add_class(self, node: ast.ClassDef) -> None:
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and class_in(item.annotation):
                self.attributes[node.name, item.target.id] = class_in(item.annotation) or ""
            elif isinstance(item, ast.FunctionDef):
                self.methods[node.name, item.name] = item
                scope = self.scope_of(item, {"self": node.name})
                for part in ast.walk(item):  # self.x = parameter
                    for target, value in assignments(part):
                        is_own = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
                        if is_own and (held := self.of(value, scope)):
                            self.attributes[node.name, target.attr] = held  # type: ignore[attr-defined]

    def scope_of(self, function: ast.FunctionDef | ast.Lambda, outer: dict[str, str]) -> dict[str, str]:
        """Names to classes inside a function: those around it, its parameters, and what it assigns."""
        arguments = function.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        scope = {name: held for name, held in outer.items() if name not in {p.arg for p in parameters if p.annotation}}
        scope |= {parameter.arg: name for parameter in parameters if (name := class_in(parameter.annotation))}
        for node in ast.walk(function):
            for target, value in assignments(node):
                if isinstance(target, ast.Name):
                    held = self.of(value, scope)
                    scope.pop(target.id, None)
                    if held:
                        scope[target.id] = held
        return scope

    def of(self, node: ast.expr | None, scope: dict[str, str]) -> str | None:
        """The class of an expression, where it can be told."""
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.of(node.value, scope)
            return self.attributes.get((owner, node.attr)) if owner else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id if node.func.id[:1].isupper() else self.functions.get(node.func.id)
        return None


def class_in(annotation: ast.expr | None) -> str | None:
    """`Config`, `Config | None` and `"Config"` are a Config; a list of them is not."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        return class_in(annotation.left) or class_in(annotation.right)
    if isinstance(annotation, ast.Name) and annotation.id[:1].isupper():
        return annotation.id
    return None


def assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment; `a, b = c, d` is two."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value


def reads_in(trees: list[ast.Module], schema_trees: list[ast.Module], schema: dict[str, set[str]]) -> Reads:
    """The fields of the schema that the code reads, directly or through a property or method of the group."""
    types = Types(schema_trees + trees)
    found: Reads = set()
    for tree in trees:
        _visit(tree, {}, types, schema, found)
    return found


def _visit(node: ast.AST, scope: dict[str, str], types: Types, schema: dict[str, set[str]], found: Reads) -> None:
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, ast.FunctionDef | ast.Lambda):
            owner = {"self": node.name} if isinstance(node, ast.ClassDef) else {}
            inner = types.scope_of(child, scope | owner)
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            _note(types.of(child.value, inner), child.attr, types, schema, found)
        _visit(child, inner, types, schema, found)


def _note(owner: str | None, name: str, types: Types, schema: dict[str, set[str]], found: Reads) -> None:
    if owner not in schema or (owner, name) in found:
        return
    if name in schema[owner]:
        found.add((owner, name))
    elif method := types.methods.get((owner, name)):
        _visit(ast.Module([method], []), {"self": owner}, types, schema, found)


def unread(schema: dict[str, set[str]], files: list[Path]) -> list[str]:
    trees = [ast.parse(path.read_text()) for path in files]
    schema_trees = [ast.parse(path.read_text()) for path in SCHEMA_FILES]
    read = reads_in(trees, schema_trees, schema)
    return sorted(f"{owner}.{name}" for owner, names in schema.items() for name in names if (owner, name) not in read)


def test_every_field_of_the_schema_is_read_by_the_code() -> None:
    assert unread(schema_classes(), code_files()) == []


def test_a_field_that_nobody_reads_is_found() -> None:
    schema, owners = schema_classes(), ["BatchConfig", "Config", "EvaluateConfig", "ModelConfig"]
    for owner in owners:
        schema[owner] |= {
            "lr_that_nobody_reads",
            "hidden_size",
        }  # the code reads hidden_size, of another library's config
    absent = [f"{owner}.{name}" for owner in owners for name in ("hidden_size", "lr_that_nobody_reads")]
    assert unread(schema, code_files()) == absent


PATTERNS = {
    "def f(config: Config): return config.batch.packing": True,
    "def f(batch: BatchConfig): return batch.packing": True,
    "def f(batch: 'BatchConfig | None'): return batch.packing": True,
    "def f(config: Config):\n    settings = config.batch\n    return lambda: settings.packing": True,
    "def f(config: Config):\n    name, b = config.name, config.batch\n    return b.packing": True,
    "class A:\n    def __init__(self, c: Config): self.config = c\n    def g(self): self.config.batch.packing": True,
    "class A:\n    run: Run\n    def g(self): self.run.config.batch.packing\nclass Run:\n    config: Config": True,
    "def load() -> Config: ...\ndef f(): return load().batch.packing": True,
    "def f(config): return config.batch.packing": False,  # nothing says whose config it is
    "def f(batch: Batch): return batch.packing": False,
    "def f(config: Config): config.batch.packing = 1": False,  # written, not read
    "def f(config: Config):\n    b = config.batch\n    b = other()\n    return b.packing": False,
    "def f(config: Config): return config.data.packing": False,
}


@pytest.mark.parametrize(("code", "is_read"), PATTERNS.items())
def test_a_read_counts_where_the_owner_is_the_group(code: str, is_read: bool) -> None:
    schema_trees = [ast.parse(path.read_text()) for path in SCHEMA_FILES]
    found = reads_in([ast.parse(code)], schema_trees, schema_classes())
    assert (("BatchConfig", "packing") in found) is is_read


def test_a_method_of_a_group_reads_what_its_body_reads() -> None:
    schema_trees = [ast.parse(path.read_text()) for path in SCHEMA_FILES]
    code = ast.parse("def f(batch: BatchConfig): return batch.gradient_accumulation_steps(2)")
    assert reads_in([code], schema_trees, schema_classes()) == {
        ("BatchConfig", "global_batch_size"),
        ("BatchConfig", "micro_batch_size"),
    }
