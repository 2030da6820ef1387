"""What a kernel file may say, decided on its syntax tree before anything of it runs.

A kernel computes shapes and traces arrays, so a few modules suffice. Whatever reaches past their public functions (a
private name, another module behind one of them, attribute assignment, text run as code, reflection, a callback, the
environment) could make the checked program another than the timed one, and is refused by line and rule. What is meant
and harmless for a file of another kind is declared in its baseline, which seals it:

    NEEDS = ("scipy.special", "no pallas")    # a tuple of strings: modules to import; a plain XLA program

The rules are on names, so they hold whatever a value turns out to be; nothing here imports what it judges.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

MODULES = (
    *("jax", "jax.numpy", "jax.lax", "jax.experimental.pallas", "jax.experimental.pallas.tpu"),
    *("numpy", "functools", "math", "dataclasses", "typing", "enum", "itertools", "collections.abc"),
)
# Reached through those, or imported by themselves, in a kernel's everyday use.
_PARTS = (
    *("jax.random", "jax.nn", "jax.tree", "jax.tree_util", "jax.dtypes", "jax.typing", "jax.scipy.special"),
    *("jax.numpy.linalg", "jax.numpy.fft", "jax.lax.linalg", "numpy.random", "numpy.linalg", "numpy.fft"),
)
_REACHABLE = frozenset((*MODULES, *_PARTS))
_PACKAGES = frozenset(module.rsplit(".", 1)[0] for module in _REACHABLE if "." in module) - _REACHABLE
NO_PALLAS = "no pallas"
NEEDS = "NEEDS"
REFERENCE = "reference_fn"
_MAIN = ("__name__ == '__main__'", "'__main__' == __name__")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Modules whose public names are mostly not for kernels: these alone.
_ONLY = {
    "jax": """Array ShapeDtypeStruct checkpoint custom_jvp custom_vjp default_matmul_precision dtypes eval_shape grad
        hessian jacfwd jacrev jit jvp lax linearize named_call named_scope nn numpy random remat scipy tree tree_util
        typeof typing value_and_grad vjp vmap""",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "dataclasses": """FrozenInstanceError InitVar KW_ONLY MISSING asdict astuple dataclass field fields is_dataclass
        replace""",
    "enum": "Enum Flag IntEnum IntFlag StrEnum auto unique",
    "typing": """AbstractSet Annotated Any AnyStr Callable ClassVar Collection Concatenate Container Dict Final
        FrozenSet Generic Hashable Iterable Iterator List Literal Mapping MutableMapping MutableSequence NamedTuple
        Never NewType NoReturn Optional ParamSpec Protocol Self Sequence Set Sized SupportsFloat SupportsIndex
        SupportsInt Tuple Type TypeAlias TypeVar TypedDict Union assert_never cast final overload TYPE_CHECKING""",
}
# Public names that read or write files, call back, change a setting for everybody, or stand for a ready-made kernel.
_EXCEPT = {
    "jax.numpy": "from_dlpack fromfile frompyfunc load save savez set_printoptions",
    "jax.lax": "infeed outfeed",
    "jax.nn": "dot_product_attention initializers scaled_dot_general scaled_matmul",
    "jax.tree_util": """default_registry register_dataclass register_pytree_node register_pytree_node_class
        register_pytree_with_keys register_pytree_with_keys_class register_static""",
    "jax.experimental.pallas": """debug_check debug_print enable_debug_checks enable_poison_buffers fuser lower_as_mlir
        mosaic_gpu ops pallas_export_experimental semaphore_read tpu_sc triton""",
    "jax.experimental.pallas.tpu": """InterpretParams LoweringException core force_tpu_interpret_mode
        reset_tpu_interpret_mode_state set_tpu_interpret_mode trace_value""",
    "numpy": """DataSource ScalarType bmat from_dlpack fromfile frompyfunc fromregex genfromtxt get_include info load
        loadtxt memmap nested_iters nditer save savetxt savez savez_compressed sctypeDict set_printoptions setbufsize
        seterr seterrcall show_config show_runtime test typecodes char core ctypeslib dtypes emath exceptions f2py lib
        ma polynomial rec strings testing typing conftest distutils matlib matrixlib tests version""",
    "numpy.random": "bit_generator mtrand set_bit_generator test tests",
    "numpy.linalg": "lapack_lite test tests",
    "numpy.fft": "test tests",
}
_ALLOWED = {module: _words(names) for module, names in _ONLY.items()}
_REFUSED = {module: _words(names) for module, names in _EXCEPT.items()}

# Never, whoever defines the name: they run text, read or write files, or reach objects by their names.
_BUILTINS_NEVER = _words("__import__ breakpoint compile delattr eval exec getattr globals locals open setattr vars")
# Built-in names with no place in a kernel, but good names for variables.
_BUILTINS_UNLESS_DEFINED = _words("copyright credits dir exit help id input license memoryview quit")
_DUNDERS = frozenset(("__name__", "__doc__"))
_OF_NAMEDTUPLES = _words("_replace _asdict _make _fields")  # public, whatever their names say
# Methods that a class may define; others decide what a type check, an attribute or an array's memory is.
_METHODS = _words("""
    __init__ __post_init__ __call__ __repr__ __str__ __eq__ __ne__ __hash__ __lt__ __le__ __gt__ __ge__ __len__
    __iter__ __next__ __contains__ __getitem__ __bool__ __int__ __float__ __index__ __enter__ __exit__ __add__ __radd__
    __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__ __mod__ __neg__ __matmul__
    __rmatmul__ __and__ __or__ __xor__ __invert__ __lshift__ __rshift__ __pow__""")
# Attributes that lead from a value to frames, classes, code, raw memory or files, or change what a name does in jax.
_ATTRIBUTES_NEVER = _words("""
    mro ctypes dump tofile tb_frame tb_next tb_lasti tb_lineno f_back f_builtins f_code f_globals f_locals f_trace
    gi_code gi_frame gi_yieldfrom cr_await cr_code cr_frame cr_origin ag_await ag_code ag_frame func_globals func_code
    co_code co_consts cell_contents def_impl def_abstract_eval def_effectful_abstract_eval def_custom_bind
    register_lowering register_node format_map cffi capsule""")


@dataclass(frozen=True, kw_only=True)
class Violation:
    """Where a file breaks which rule."""

    line: int
    rule: str


def needs_of(tree: ast.Module) -> tuple[str, ...]:
    """What the file declares in NEEDS. Raises ValueError where that is no tuple of strings."""
    found: tuple[str, ...] = ()
    for node in tree.body:
        names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if isinstance(node, ast.Assign) and NEEDS in names:
            value = ast.literal_eval(node.value)
            if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f'{NEEDS} must be a tuple of strings, e.g. {NEEDS} = ("{NO_PALLAS}",)')
            found = tuple(value)
    return found


def violations(tree: ast.Module, needs: tuple[str, ...] = ()) -> list[Violation]:
    """Every rule that the file breaks, in the order of its lines; `needs` is what its baseline declares."""
    checker = _Checker(_without_main_block(tree), frozenset(needs))
    return sorted(checker.run(), key=lambda violation: violation.line)


def _without_main_block(tree: ast.Module) -> ast.Module:
    """The file but for what stands below `if __name__ == "__main__":`, which no judge runs."""
    body: list[ast.stmt] = []
    for node in tree.body:
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) in _MAIN
        body += node.orelse if is_main and isinstance(node, ast.If) else [node]
    return ast.Module(body=body, type_ignores=[])


def module_chains(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, attributes) of every name that the file takes from a module: what a worker can resolve beforehand."""
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.module, (alias.name,)
        elif isinstance(node, ast.Attribute):
            root, path = _dotted(node)
            if root is not None and root.id in aliases:
                yield aliases[root.id], path


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Name → module for every import that binds a module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = _bound_by(alias)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in _REACHABLE or full in _PACKAGES:
                    found[alias.asname or alias.name] = full
    return found


def _bound_by(alias: ast.alias) -> str:
    """The module that `import a.b` or `import a.b as c` gives a name: a, or a.b."""
    return alias.name if alias.asname else alias.name.split(".")[0]


def _dotted(node: ast.expr) -> tuple[ast.Name | None, tuple[str, ...]]:
    """`a.b.c` → (the name a, ("b", "c")); (None, …) where the chain starts at another expression."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    return (node if isinstance(node, ast.Name) else None), tuple(path)


def _parameters(node: ast.AST) -> list[str]:
    """Names of a function's positional parameters."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return []
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]


def _attributes_of(kind: ast.AST, own: str) -> set[str]:
    """What a class sets on `own` or defines in its body."""
    found = set()
    for node in ast.walk(kind):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own:
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
        elif isinstance(node, ast.FunctionDef) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
            found.add(node.name if isinstance(node, ast.FunctionDef) else node.id)
    return found


class _Checker:
    """One pass over a file's syntax tree."""

    def __init__(self, tree: ast.Module, needs: frozenset[str]) -> None:
        self._tree = tree
        self._needs = needs - {NO_PALLAS}
        self._aliases = _aliases(tree)
        self._parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self._bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self._bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        self._found: list[Violation] = []

    def run(self) -> list[Violation]:
        for node in ast.walk(self._tree):
            visit = getattr(self, f"_visit_{type(node).__name__}", None)
            if visit is not None:
                visit(node)
        return self._found

    def _refuse(self, node: ast.AST, rule: str) -> None:
        self._found.append(Violation(line=getattr(node, "lineno", 0), rule=rule))

    # --- imports ---

    def _may_import(self, module: str) -> bool:
        return module in _REACHABLE or module in _PACKAGES or (module in self._needs and "._" not in module)

    def _bind(self, node: ast.AST, name: str | None, target: str = "") -> None:
        """Something other than an assignment gives `name` a value; only an import gives one to a module's name."""
        if name is not None and name.startswith("__"):
            self._refuse(node, f"{name}: introspection")
        elif name is not None and self._aliases.get(name, target) != target:
            self._refuse(node, f"module {self._aliases[name]} bound again: give {name} one meaning")

    def _visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self._bind(node, node.name)

    def _visit_MatchAs(self, node: ast.MatchAs) -> None:
        self._bind(node, node.name)

    def _visit_MatchStar(self, node: ast.MatchStar) -> None:
        self._bind(node, node.name)

    def _visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        self._bind(node, node.rest)

    def _visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._bind(node, alias.asname or alias.name.split(".")[0], _bound_by(alias))
            if not self._may_import(alias.name):
                self._refuse_import(node, alias.name)

    def _visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level or module == "__future__":
            if node.level:
                self._refuse(node, "relative import: a kernel file stands alone")
            return
        if not self._may_import(module):
            self._refuse_import(node, module)
            return
        for alias in node.names:
            self._bind(node, alias.asname or alias.name, f"{module}.{alias.name}")
            if alias.name == "*":
                self._refuse(node, f"from {module} import *: import the names you use")
            elif not self._may_import(f"{module}.{alias.name}"):
                self._check_member(node, module, alias.name)

    def _refuse_import(self, node: ast.AST, module: str) -> None:
        private = " (private to jax)" if "._src" in module or module.startswith("jaxlib") else ""
        self._refuse(
            node,
            f"import of {module}{private}: a kernel file may import {', '.join(MODULES)}; a baseline that needs more "
            f'declares it, e.g. {NEEDS} = ("{module}",)',
        )

    # --- names ---

    def _visit_Name(self, node: ast.Name) -> None:
        name = node.id
        if name.startswith("__") and (name not in _DUNDERS or not isinstance(node.ctx, ast.Load)):
            self._refuse(node, f"{name}: introspection")
        elif name in _BUILTINS_NEVER and not self._is_plain_getattr(node):
            self._refuse(node, f"{name}: dynamic execution, introspection and files have no place in a kernel file")
        elif name in _BUILTINS_UNLESS_DEFINED and name not in self._bound:
            self._refuse(node, f"{name}: a built-in that has no place in a kernel file")
        elif name in self._aliases and not self._is_base(node):
            what = "bound again" if not isinstance(node.ctx, ast.Load) else "used as a value"
            self._refuse(node, f"module {self._aliases[name]} {what}: use its functions by their full names")
        elif name == REFERENCE and isinstance(node.ctx, ast.Load):
            self._refuse(node, f"{REFERENCE} called or passed on: it is the oracle's")

    def _is_plain_getattr(self, node: ast.Name) -> bool:
        """`getattr(x, "dtype")`: the same as `x.dtype`, so held to the same rule."""
        call = self._parents.get(node)
        if node.id != "getattr" or not isinstance(call, ast.Call) or call.func is not node or len(call.args) < 2:
            return False
        name = call.args[1].value if isinstance(call.args[1], ast.Constant) else None
        return isinstance(name, str) and not name.startswith("_") and name not in _ATTRIBUTES_NEVER

    def _is_base(self, node: ast.expr) -> bool:
        parent = self._parents.get(node)
        return isinstance(parent, ast.Attribute) and parent.value is node

    def _visit_arg(self, node: ast.arg) -> None:
        self._bind(node, node.arg)

    def _define(self, node: ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) -> None:
        if node.name.startswith("__") and node.name not in _METHODS:
            self._refuse(node, f"def {node.name}: a class may not define this method")
        if node.name in self._aliases:
            self._refuse(node, f"module {self._aliases[node.name]} bound again: give {node.name} another name")

    _visit_FunctionDef = _visit_AsyncFunctionDef = _define

    def _visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._define(node)
        if node.keywords:
            self._refuse(node, f"class {node.name} with a metaclass or class arguments")

    def _visit_MatchClass(self, node: ast.MatchClass) -> None:
        self._refuse(node, "class pattern: it reads attributes by name")

    # --- attributes ---

    def _visit_Attribute(self, node: ast.Attribute) -> None:
        root, path = _dotted(node)
        if self._is_own(node):
            return
        if not isinstance(node.ctx, ast.Load):
            whose = f" on module {self._aliases[root.id]}" if root is not None and root.id in self._aliases else ""
            self._refuse(
                node, f"attribute assignment{whose} (.{node.attr}): a kernel file changes no object's attributes"
            )
        elif node.attr.startswith("_") and node.attr not in _DUNDERS | _OF_NAMEDTUPLES:
            self._refuse(node, f".{node.attr}: a private attribute")
        elif node.attr in _ATTRIBUTES_NEVER:
            self._refuse(node, f".{node.attr}: introspection, or a change of what jax does")
        elif root is not None and root.id in self._aliases:
            self._check_chain(node, self._aliases[root.id], path)

    def _is_own(self, node: ast.Attribute) -> bool:
        """`self.x` or `self._x` in a method of a class that itself sets or defines it."""
        if not isinstance(node.value, ast.Name) or node.attr.startswith("__") or node.attr in _ATTRIBUTES_NEVER:
            return False
        name, inner = node.value.id, self._parents[node]
        while not (isinstance(inner, ast.FunctionDef) and isinstance(self._parents[inner], ast.ClassDef)):
            if inner not in self._parents or name in _parameters(inner):
                return False
            inner = self._parents[inner]
        stored = {n.id for n in ast.walk(inner) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        is_self = _parameters(inner)[:1] == [name] and name not in stored and name not in self._aliases
        return is_self and node.attr in _attributes_of(self._parents[inner], name)

    def _check_chain(self, node: ast.Attribute, module: str, path: tuple[str, ...]) -> None:
        """`module.a.b`: every step is a module that may be reached, until one is a member that may be used."""
        for depth, name in enumerate(path):
            full = f"{module}.{name}"
            if self._may_import(full):
                module = full
                if depth == len(path) - 1 and not self._is_base(node):
                    self._refuse(node, f"module {module} used as a value: use its functions by their full names")
                continue
            if depth == len(path) - 1:  # else the shorter chain, a node of its own, has been checked
                self._check_member(node, module, name)
            return

    def _check_member(self, node: ast.AST, module: str, name: str) -> None:
        if module in self._needs:
            return
        allowed = _ALLOWED.get(module)
        bad = (
            name.startswith("_")
            or module in _PACKAGES
            or (allowed is not None and name not in allowed)
            or name in _REFUSED.get(module, ())
            or (module.startswith("jax") and name.endswith("_p"))
        )
        if bad:
            self._refuse(node, f"{module}.{name}: not for a kernel file ({_why(module, name)})")

    # --- the rest ---

    def _visit_Subscript(self, node: ast.Subscript) -> None:
        root, path = _dotted(node.value)
        if not isinstance(node.ctx, ast.Load) and root is not None and path and root.id in self._aliases:
            self._refuse(node, f"item assignment on module {self._aliases[root.id]}")

    def _visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "type" and len(node.args) + len(node.keywords) != 1:
            self._refuse(node, "type(…) with three arguments: write a class")
        _, path = _dotted(node.func)
        if path[-1:] == ("dataclass",) and node.args:
            self._refuse(node, "dataclass(cls): use it as a decorator, which changes no other class")


def _why(module: str, name: str) -> str:
    if "callback" in name or name in ("debug", "debug_print", "debug_check", "effects_barrier", "ffi"):
        return "callbacks: all work belongs into the compiled program"
    if name in ("devices", "local_devices", "default_backend", "config", "environ", "print_environment_info"):
        return "it reads or sets the environment"
    if name in ("dot_product_attention", "scaled_matmul"):
        return "a ready-made kernel"
    if module in _PACKAGES:
        return "only " + ", ".join(sorted(m for m in _REACHABLE if m.startswith(module + "."))) + " may be reached"
    return "files, other modules, settings and internals are out of its reach"
