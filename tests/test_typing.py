"""The hand-written stub of krul._core lists exactly what the module has."""

import ast
import inspect

import krul._core as core


def stub_of(root):
    return ast.parse((root / "krul" / "_core.pyi").read_text())


def parameters_in_stub(function, is_method=False):
    arguments = function.args
    positional = [a.arg for a in arguments.posonlyargs + arguments.args]
    return positional[1:] if is_method else positional


def parameters_in_module(function):
    kinds = inspect.Parameter
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]


def test_stub_lists_exactly_the_functions(root):
    in_stub = {node.name: node for node in stub_of(root).body if isinstance(node, ast.FunctionDef)}
    in_module = {name: f for name, f in vars(core).items() if inspect.isbuiltin(f)}
    assert set(in_stub) == set(in_module)
    for name, function in in_module.items():
        assert parameters_in_stub(in_stub[name]) == parameters_in_module(function), name


def test_stub_lists_exactly_the_constants(root):
    in_stub = {
        node.target.id
        for node in stub_of(root).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if not node.target.id.startswith("_")
    }
    in_module = {name for name, value in vars(core).items() if isinstance(value, (int, float))}
    assert in_stub == in_module


def test_stub_lists_exactly_the_types(root):
    in_stub = {node.name: node for node in stub_of(root).body if isinstance(node, ast.ClassDef)}
    in_module = {name: t for name, t in vars(core).items() if isinstance(t, type)}
    assert set(in_stub) == set(in_module)
    for name, node in in_stub.items():
        methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        public = {n for n in vars(in_module[name]) if not n.startswith("__")}
        assert {n for n in methods if not n.startswith("__")} == public
        for method in public:
            found = parameters_in_module(getattr(in_module[name], method))[1:]
            assert parameters_in_stub(methods[method], is_method=True) == found, method


def test_functions_say_what_they_do():
    for name, function in vars(core).items():
        if inspect.isbuiltin(function):
            assert function.__doc__, name


def test_every_module_is_annotated(root):
    """Each public function of the package says what it takes and returns."""
    for path in sorted((root / "krul").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                names = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                bare = [a.arg for a in names if a.annotation is None]
                assert set(bare) <= {"self", "cls"}, (path.name, node.name)
                assert node.returns is not None, (path.name, node.name)
