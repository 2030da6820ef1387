"""judge/policy.py: what a kernel file may say, by line and rule."""

import ast
import importlib
import pkgutil
import types
from pathlib import Path

import pytest

from judge import policy

ROOT = Path(__file__).resolve().parent.parent
HEAD = """import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
"""


def rules(text: str, needs: tuple[str, ...] = ()) -> list[str]:
    return [f"{v.line}: {v.rule}" for v in policy.violations(ast.parse(HEAD + text), needs)]


REFUSED = [
    ("import os", "import of os: a kernel file may import jax"),
    ("import jax._src.core", "import of jax._src.core (private to jax)"),
    ("from jax._src import core", "import of jax._src (private to jax)"),
    ("from jaxlib import xla_client", "import of jaxlib (private to jax)"),
    ("from jax.experimental import io_callback", "jax.experimental.io_callback: not for a kernel file (callbacks"),
    ("from jax.experimental.pallas.ops.tpu import flash_attention", "import of jax.experimental.pallas.ops.tpu"),
    ("from jax.experimental.pallas import *", "import *: import the names you use"),
    ("from . import other", "relative import"),
    ("jax.lax.add = None", "attribute assignment on module jax (.add)"),
    ("pl.pallas_call = print", "attribute assignment on module jax.experimental.pallas (.pallas_call)"),
    ("del jnp.exp", "attribute assignment on module jax.numpy (.exp)"),
    ("add = jax.lax.add_p\nadd.multiple = 1", "jax.lax.add_p: not for a kernel file"),
    ("def f(x):\n    x.lowering = 1", "attribute assignment (.lowering)"),
    ("class A:\n    def go(self, other):\n        other.x = 1", "attribute assignment (.x)"),
    ("class A:\n    def go(self, other):\n        self = other\n        self.x = 1", "attribute assignment (.x)"),
    ("class A:\n    def go(self):\n        return self._src", "._src: a private attribute"),
    (
        "class A:\n    def go(self):\n        self._x = 1\n        return lambda self: self._x",
        "._x: a private attribute",
    ),
    ("class A:\n    def go(self):\n        self.__class__ = int", "attribute assignment (.__class__)"),
    ("__name__ = '__main__'", "__name__: introspection"),
    ("def f(__name__): pass", "__name__: introspection"),
    ("import jax as __name__", "__name__: introspection"),
    ("try:\n    pass\nexcept Exception as __name__:\n    pass", "__name__: introspection"),
    ("match 1:\n    case __name__:\n        pass", "__name__: introspection"),
    ("import dataclasses as m\nSYS = m.sys\nimport jax.numpy as m", "module jax.numpy bound again"),
    ("from functools import partial as jnp", "module jax.numpy bound again"),
    ("try:\n    pass\nexcept Exception as jnp:\n    pass", "module jax.numpy bound again"),
    ("match 1:\n    case [*jnp]:\n        pass", "module jax.numpy bound again"),
    ("match {}:\n    case {**jnp}:\n        pass", "module jax.numpy bound again"),
    ("if __name__ == '__main__' or True:\n    import os", "import of os"),
    ("def f():\n    if __name__ == '__main__':\n        import os", "import of os"),
    ("if __name__ == '__main__':\n    pass\nelse:\n    import os", "import of os"),
    ("import enum\nenum.sys", "enum.sys: not for a kernel file"),
    ("import collections.abc\ncollections.namedtuple", "collections.namedtuple: not for a kernel file"),
    ("setattr(jax, 'jit', None)", "setattr: dynamic execution, introspection"),
    ("getattr(jnp.exp, '__globals__')", "getattr: dynamic execution, introspection"),
    ("name = 'dtype'\ngetattr(jnp.exp, name)", "getattr: dynamic execution, introspection"),
    ("x = jnp.exp.__globals__", ".__globals__: a private attribute"),
    ("x = jax._src", "._src: a private attribute"),
    ("x = [].__class__.__base__.__subclasses__()", "a private attribute"),
    ("x = (lambda: 0).func_globals", ".func_globals: introspection"),
    ("m = dataclasses\nm.sys", "module dataclasses used as a value"),
    ("x = dataclasses.sys.modules", "dataclasses.sys: not for a kernel file"),
    ("from dataclasses import sys", "dataclasses.sys: not for a kernel file"),
    ("x = functools.namedtuple", "functools.namedtuple: not for a kernel file"),
    ("functools.update_wrapper(jnp.exp, jnp.sin)", "functools.update_wrapper: not for a kernel file"),
    ("f = [jax]", "module jax used as a value"),
    ("jax = None", "module jax bound again"),
    ("def f(jax):\n    return jax", "module jax bound again"),
    ("def jnp():\n    pass", "module jax.numpy bound again"),
    ("exec('x = 1')", "exec: dynamic execution"),
    ("eval('1')", "eval: dynamic execution"),
    ("def f(eval):\n    return eval('1')", "eval: dynamic execution"),
    ("__import__('os')", "__import__: introspection"),
    ("__builtins__", "__builtins__: introspection"),
    ("open('/etc/passwd')", "open: dynamic execution, introspection and files"),
    ("np.load('x.npy')", "numpy.load: not for a kernel file"),
    ("np.lib.stride_tricks", "numpy.lib: not for a kernel file"),
    ("np.ctypeslib", "numpy.ctypeslib: not for a kernel file"),
    ("np.zeros(3).ctypes", ".ctypes: introspection"),
    ("np.zeros(3).tofile('x')", ".tofile: introspection"),
    ("jax.pure_callback(None, None)", "jax.pure_callback: not for a kernel file (callbacks"),
    ("jax.debug.print('x')", "jax.debug: not for a kernel file (callbacks"),
    ("pl.debug_print('x')", "debug_print: not for a kernel file (callbacks"),
    ("jax.devices()", "jax.devices: not for a kernel file (it reads or sets the environment)"),
    ("jax.config.update('jax_enable_x64', True)", "jax.config: not for a kernel file"),
    ("jax.nn.dot_product_attention", "jax.nn.dot_product_attention: not for a kernel file (a ready-made kernel)"),
    ("pltpu.InterpretParams()", "InterpretParams: not for a kernel file"),
    ("pltpu.force_tpu_interpret_mode()", "force_tpu_interpret_mode: not for a kernel file"),
    ("pl.semaphore_read", "semaphore_read: not for a kernel file"),
    ("jax.tree_util.register_pytree_node(int, None, None)", "register_pytree_node: not for a kernel file"),
    ("match f:\n    case object(x=y):\n        pass", "class pattern: it reads attributes by name"),
    ("class A(metaclass=type):\n    pass", "class A with a metaclass"),
    ("class A:\n    def __getattr__(self, name):\n        return 1", "def __getattr__: a class may not"),
    ("class A:\n    def __array_interface__(self):\n        return {}", "def __array_interface__: a class may not"),
    ("class A:\n    __match_args__ = ()", "__match_args__: introspection"),
    ("x = type('A', (), {})", "type(…) with three arguments"),
    ("dataclasses.dataclass(jnp.ndarray)", "dataclass(cls): use it as a decorator"),
    ("def kernel_fn(*a):\n    return reference_fn(*a)", "reference_fn called or passed on"),
    ("f = reference_fn", "reference_fn called or passed on"),
    ("x = vars()", "vars: dynamic execution"),
    ("x = id(3)", "id: a built-in that has no place"),
]


@pytest.mark.parametrize(("text", "told"), REFUSED, ids=[text.replace("\n", ";")[:50] for text, _ in REFUSED])
def test_refused_with_line_and_rule(text, told):
    found = rules(text)
    assert any(told in rule for rule in found), found
    first = HEAD.count("\n") + 1
    assert all(first <= int(rule.split(":")[0]) <= first + text.count("\n") for rule in found)


ALLOWED = [
    "from __future__ import annotations",
    "from jax import lax, numpy\nx = lax.rem, numpy.exp",
    "import jax.experimental.pallas as pallas\nf = pallas.cdiv",
    "from jax.experimental.pallas import tpu\nf = tpu.VMEM",
    "import math, typing\nx: typing.Any = math.pi",
    "from functools import partial\nf = partial(jnp.sum, axis=0)",
    "@dataclasses.dataclass(frozen=True)\nclass Block:\n    rows: int = 8\n\n    def __call__(self):\n        pass",
    "f = jax.jit(lambda x: jax.nn.silu(x))",
    "x = jnp.linalg.norm, np.random.default_rng(0), jax.random.key(0), jax.tree.map",
    "dtype = getattr(np.zeros(1), 'dtype', None)",
    "input = 3\nid = input + 1",
    "with jax.named_scope('x'):\n    pass",
    "if __name__ == '__main__':\n    print(reference_fn())",
    "if __name__ == '__main__':\n    import time\n    jax.block_until_ready(jax.devices())",
    "class A:\n    def __init__(self, a):\n        self.a, self._b = a, 1\n    def go(self):\n        return self._b",
    "import enum\nimport itertools\nfrom collections.abc import Callable\nclass A(enum.Enum):\n    x = enum.auto()",
    "def f(x):\n    return x._replace(a=1)",
    "try:\n    pass\nexcept ValueError as error:\n    raise error",
    "kind = type(3)",
    "x = jnp.zeros(3).at[0].set(1)",
    "ref = [0]\nref[0] = 1",
    "match 3:\n    case 1 | 2:\n        pass",
    "info = pltpu.get_tpu_info",
]


@pytest.mark.parametrize("text", ALLOWED, ids=[text.replace("\n", ";")[:50] for text in ALLOWED])
def test_allowed(text):
    assert rules(text) == []


@pytest.mark.parametrize("path", ["kernel.py", "tests/kernels/scaled_add.py"])
def test_the_projects_own_kernels_are_allowed(path):
    assert policy.violations(ast.parse((ROOT / path).read_text())) == []


def test_a_baseline_may_need_more():
    text = "import scipy.special\nx = scipy.special.erf"
    assert rules(text) and not rules(text, ("scipy.special", "scipy"))
    assert policy.needs_of(ast.parse('NEEDS = ("scipy.special", "no pallas")')) == ("scipy.special", "no pallas")
    assert rules("from jax._src import core", ("jax._src",)), "what is private to jax stays so"


@pytest.mark.parametrize("text", ["NEEDS = f()", "NEEDS = 'os'", "NEEDS = (1,)"])
def test_needs_is_a_tuple_of_strings(text):
    with pytest.raises(ValueError):
        policy.needs_of(ast.parse(text))


@pytest.mark.parametrize("module", (*policy.MODULES, *policy._PARTS))
def test_no_allowed_name_is_a_module(module):
    """In the pinned versions, no public name that a kernel file may take from a module leads to another module, nor
    would one if anything had imported the module's own parts."""
    loaded = importlib.import_module(module)
    names = {name for name in dir(loaded) if isinstance(getattr(loaded, name), types.ModuleType)}
    names |= {part.name for part in pkgutil.iter_modules(getattr(loaded, "__path__", ()))}
    for name in sorted(name for name in names if name[0] != "_"):
        if f"{module}.{name}" in policy._REACHABLE | policy._PACKAGES:
            continue
        for text in (f"import {module} as m\nx = m.{name}.y", f"from {module} import {name}"):
            assert policy.violations(ast.parse(text)), text
