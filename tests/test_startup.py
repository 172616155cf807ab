"""Listing imports neither torch nor a kernel's library, and says nothing of its own."""

from __future__ import annotations

import json
from textwrap import dedent

import fake_distributions
import pytest
from fake_distributions import declaring

world = fake_distributions.world

SPY = """
import sys

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'torch', 'numpy', 'acme_kernel', 'flash_attn'}:
            raise AssertionError(f'{name} was imported')
sys.meta_path.insert(0, Spy())
"""


@pytest.mark.parametrize(
    "code",
    [
        "import attn_core; attn_core.__version__, dir(attn_core)",
        "import attn_core; attn_core.list_backends()",
        "import attn_core.cli, attn_core.registry, attn_core.listing, attn_core.plugin",
        "from attn_core.cli import main; main(['list-backends'])",
        "from attn_core.cli import main; main(['list-backends', '--json'])",
        "from attn_core import registry, BackendNotUsable\ntry: registry.find('acm')\nexcept BackendNotUsable: pass",
    ],
)
def test_torch_and_the_kernels_stay_out(world, code):
    world.distribution("attn-core", "0.1.0")  # where the tests run on a checkout
    (world.folders[0] / "acme_kernel.py").write_text("raise RuntimeError('a kernel was loaded')")
    world.wheel("acme-attn", declaring("'acme', needs='acme_kernel', forward='acme_kernel:forward'"))
    run = world.python("-c", SPY + code)
    assert run.stderr == ""


def test_nothing_is_printed_at_a_first_call(world):
    """Of what torch warns its callers: torch 2.14 does where its objects with guards are asked for by their older names."""
    alone = "import torch.distributed; q = torch.ones(1, 4, 2, 8)"
    call = "; import attn_core.parallel; attn_core.attention(q, q, q, backend='native_math')"
    printed = [world.python("-c", code) for code in (alone, alone + call)]
    assert (printed[1].stdout, printed[1].stderr) == (printed[0].stdout, printed[0].stderr)


def test_python_m_and_the_command_say_the_same(world):
    world.wheel("acme-attn", declaring("'acme'"))
    by_module = world.run("list-backends", "--json")
    by_function = world.python(
        "-c", "import sys; from attn_core.cli import main; sys.exit(main(['list-backends', '--json']))"
    )
    assert by_module.stdout == by_function.stdout
    assert "acme" in {row["name"] for row in json.loads(by_module.stdout)}


def test_importing_attn_asks_no_wheel(world):
    world.wheel("acme-attn", "print('asked')\n" + declaring("'acme'"))
    assert world.python("-c", "import attn_core, attn_core.cli, attn_core.registry").stdout == ""
    assert world.python("-c", "import attn_core; attn_core.list_backends()").stdout == "asked\n"


def test_slow_modules_are_imported_only_where_they_are_needed(world):
    world.wheel("acme-attn", declaring("'acme'"))
    code = """
        import argparse, pluggy, packaging.requirements, sys
        from attn_core.installed import metadata
        before = set(sys.modules)
        from attn_core.cli import main
        main(["list-backends"])
        slow = {"difflib", "json", "email.parser", "attn_core.probe", "attn_core.loading", "attn_core.commands.explain"}
        print(sorted((set(sys.modules) - before) & slow))
    """
    assert world.python("-c", dedent(code)).stdout.splitlines()[-1] == "[]"
