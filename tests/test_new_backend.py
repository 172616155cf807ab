"""attn new-backend: what it writes is whole, right and small, and nothing that is there is lost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import fake_distributions
import pytest
from conftest import write_distribution
from packaging.requirements import Requirement

from attn_core import attention, registry
from attn_core.cli import main
from attn_core.errors import AttnError
from attn_core.known import known_wheels
from attn_core.plugin import BackendSpec
from attn_core.scaffold import KINDS, ScaffoldError, write
from attn_core.testing import check_backend, compare, draw

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

world = fake_distributions.world

FILES = {
    ".github/workflows/test.yml", ".gitignore", "LICENSE", "README.md", "pyproject.toml", "tests/test_acme.py",
    "acme_attn/__init__.py", "acme_attn/kernel.py", "acme_attn/plugin.py", "acme_attn/py.typed",
}  # fmt: skip

WITHOUT_TORCH = """
import sys

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'torch', 'numpy', 'triton', 'acme_kernels'}:
            raise ModuleNotFoundError(f'{name} is blocked', name=name)
sys.meta_path.insert(0, Spy())
"""

LIBRARY = """
import torch

def attention(q, k, v, softmax_scale, is_causal):
    assert all(tensor.is_contiguous() for tensor in (q, k, v))
    scores = q.float() @ k.float().mT * softmax_scale
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
"""


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def installed(folder, name="acme"):
    """The written package, importable and with the metadata that an installer makes."""
    package = write_metadata(folder, name)
    sys.path.insert(0, str(folder))
    registry.refresh()
    try:
        yield import_module(f"{package}.plugin")
    finally:
        sys.path.remove(str(folder))
        for module in [module for module in sys.modules if module.partition(".")[0] == package]:
            del sys.modules[module]
        registry.refresh()


def write_metadata(folder, name):
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    ((point, module),) = project["entry-points"]["attn.backends"].items()
    assert point == name
    write_distribution(folder, project["name"], project["version"], {}, module)
    return module.partition(".")[0]


def declared(module):
    (spec,) = module.attn_backends()
    return spec


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_is_whole_and_its_project_parses(kind, tmp_path):
    folder = write("acme", kind, tmp_path)
    assert folder == tmp_path / "acme-attn"
    assert files_of(folder) == FILES
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "acme-attn"
    assert project["entry-points"] == {"attn.backends": {"acme": "acme_attn.plugin"}}
    # each command that is printed works with this: pytest, python -m build, and the interpreter of Triton, which uses numpy
    more = ["numpy", "triton; sys_platform == 'linux'"] if kind == "triton" else []
    assert project["optional-dependencies"] == {"test": ["pytest", "build", *more]}
    assert Requirement("attn-core>=0.1,<1") in map(Requirement, project["dependencies"])
    assert (folder / "LICENSE").read_bytes() == (Path(__file__).parent.parent / "LICENSE").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_no_placeholder_is_left_and_the_whole_is_small(kind, tmp_path):
    folder = write("acme", kind, tmp_path)
    texts = {place: (folder / place).read_text() for place in FILES - {"LICENSE"}}
    assert {
        place for place, text in texts.items() if "$" in text.replace("${{ matrix", "").replace("\n$ ", "")
    } == set()
    assert sum(text.count("\n") for place, text in texts.items() if place.endswith(".py")) < 280


@pytest.mark.parametrize("name", ["acme", "q4", "acme_fast_2"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_ruff_as_it_comes(kind, name, tmp_path):
    if shutil.which("ruff") is None:
        pytest.skip("ruff is not installed")
    folder = write(name, kind, tmp_path)
    for command in (["check"], ["format", "--check"]):
        run = subprocess.run(
            ["ruff", *command, "--isolated", "."], check=False, cwd=folder, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_its_declaration_is_valid_and_needs_neither_torch_nor_the_library(kind, tmp_path):
    folder = write("acme", kind, tmp_path)
    code = f"{WITHOUT_TORCH}from acme_attn.plugin import attn_backends; (spec,) = attn_backends(); print(spec.name)"
    path = os.pathsep.join([str(folder), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (run.stdout, run.stderr) == ("acme\n", "")


@pytest.mark.parametrize("name", ["acme", "acme_fast_2"])
def test_names_agree(name, tmp_path):
    folder = write(name, "eager", tmp_path)
    assert folder.name == f"{name.replace('_', '-')}-attn"
    with installed(folder, name) as plugin:
        spec = declared(plugin)
        assert isinstance(spec, BackendSpec)
        assert (spec.name, spec.forward) == (name, f"{name}_attn.kernel:forward")
        assert registry.find(name).distribution == folder.name


# --- what it does -----------------------------------------------------------------------------------------------------


def test_the_eager_kernel_is_right_on_drawn_calls(tmp_path):
    limits = {
        "spoiled": [None],
        "window_size": [None],
        "softcap": [None],
        "deterministic": [False],
        "mask": ["none", "bool", "key_padding"],
    }
    limits |= {"queries": [4, 7, 17, 65], "keys": [None, None, 7, 33], "batch": [1, 2, 0]}
    with installed(write("acme", "eager", tmp_path)):
        choose = random.Random(0).choice
        outcomes = [compare(draw(choose, limits), partial(attention, backend="acme")) for _ in range(80)]
    assert [str(outcome) for outcome in outcomes if outcome is not None] == []


def test_the_eager_package_passes_the_kit(tmp_path):
    with installed(write("acme", "eager", tmp_path)):
        outcomes = list(check_backend("acme", quick=True))
    assert len(outcomes) > 40
    assert [outcome for outcome in outcomes if outcome.status == "failed"] == []


def test_a_library_that_is_not_there_is_missing_with_the_line_that_installs_it(tmp_path):
    with installed(write("acme", "library", tmp_path, "acme_cuda.kernels")):
        row = registry.meant("acme")
        assert (row.status, row.reason) == ("missing", "needs the module acme_cuda.kernels")
        assert row.next_step == "pip install acme-cuda"
        assert main(["check", "acme"]) == 3


def test_a_library_that_is_there_passes_the_kit(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "acme_kernels.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path / "there")
    with installed(write("acme", "library", tmp_path)):
        outcomes = list(check_backend("acme", quick=True))
    assert len(outcomes) > 30
    assert [outcome for outcome in outcomes if outcome.status == "failed"] == []


def test_the_triton_package_is_for_a_gpu_and_with_the_interpreter_for_a_cpu(tmp_path, monkeypatch):
    folder = write("acme", "triton", tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with installed(folder) as plugin:
        (constraints,) = declared(plugin).alternatives
        assert (constraints.platforms, "bfloat16" in constraints.dtypes) == ({"cuda"}, True)
    shutil.rmtree(next(folder.glob("*.dist-info")))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with installed(folder) as plugin:
        (constraints,) = declared(plugin).alternatives
        assert (constraints.platforms, "bfloat16" in constraints.dtypes) == ({"cpu"}, False)


@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreter", "gpu"])
def test_the_triton_kernel_is_right_on_drawn_calls(tmp_path, interpreted):
    pytest.importorskip("triton")
    torch = pytest.importorskip("torch")
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = write("acme", "triton", tmp_path)
    write_metadata(folder, "acme")
    code = """
import random
from functools import partial
from attn_core import attention
from attn_core.testing import compare, draw
limits = {"spoiled": [None], "window_size": [None], "softcap": [None], "mask": ["none"], "gradients": [()], "autocast": [None],
          "dtype": DTYPES, "queries": [4, 17, 65, 130], "keys": [None, 7, 130]}
choose = random.Random(0).choice
outcomes = [compare(draw(choose, limits, device=DEVICE), partial(attention, backend="acme")) for _ in range(40)]
print([str(outcome) for outcome in outcomes if outcome is not None])
"""
    dtypes = ["float32", "float16"] if interpreted else ["float32", "float16", "bfloat16"]
    code = code.replace("DTYPES", repr(dtypes)).replace("DEVICE", repr("cpu" if interpreted else "cuda"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "TRITON_INTERPRET": str(int(interpreted)),
    }
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "Acme", "2fast", "acme-fast", "a b", "_acme", "acme_", "a__b", "../acme", "acmé", "acme\n"]
)
def test_what_is_no_name_is_refused_and_nothing_is_written(name, tmp_path):
    with pytest.raises(ScaffoldError, match="a plain word of a-z, 0-9"):
        write(name, "eager", tmp_path)
    assert files_of(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("native", r"taken by attn-native \S+, which is installed"),
        ("_native_math", "accepted"),
        ("alpha", r"taken by attn-stub 1.0, which is installed"),
        ("first", "taken by attn-stub"),
        ("elsewhere", "taken by attn-elsewhere, which is not installed here"),
        ("stub_library", "a distribution stub-library-attn is installed"),
        ("other", "a Python module other_attn can be imported"),
    ],
)
def test_a_name_that_is_taken_is_refused(name, said, stubs, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    (there / "stub_library_attn-1.0.dist-info").mkdir()
    (there / "stub_library_attn-1.0.dist-info" / "METADATA").write_text("Name: stub-library-attn\nVersion: 1.0\n")
    (there / "other_attn.py").write_text("")
    monkeypatch.syspath_prepend(there)
    monkeypatch.setattr(registry, "known_wheels", lambda: {**known_wheels(), "attn-elsewhere": ("elsewhere",)})
    registry.refresh()
    with pytest.raises(ScaffoldError, match=said):
        write(name, "eager", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_that_is_there_is_overwritten(kind, tmp_path):
    target = tmp_path / "acme-attn"
    if kind == "folder":
        target.mkdir()
        (target / "kernel.py").write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ScaffoldError, match="is there already, and is left as it is"):
        write("acme", "eager", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert kind != "folder" or (target / "kernel.py").read_text() == "mine"


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AttnError, match="--folder"):
        write("acme", "eager", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_could_not_be_finished_is_taken_away(tmp_path, monkeypatch):
    real = Path.write_text

    def full(path, text, **options):
        if path.name == "kernel.py":
            raise OSError(28, "No space left on device")
        return real(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ScaffoldError, match="No space left on device"):
        write("acme", "eager", tmp_path)
    assert files_of(tmp_path) == set()


@pytest.mark.parametrize(
    ("kind", "library", "said"),
    [
        ("eager", "acme_kernels", "--library belongs to --kind library"),
        ("library", "acme-kernels", "a module as it is imported"),
        ("library", "acme.import", "a module as it is imported"),
    ],
)
def test_a_library_that_is_none_is_refused(kind, library, said, tmp_path):
    with pytest.raises(ScaffoldError, match=said):
        write("acme", kind, tmp_path, library)
    assert files_of(tmp_path) == set()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_to_type_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new-backend", "acme"]) == 0
    said = capsys.readouterr().out
    for line in ("cd acme-attn", "pip install -e '.[test]'", "attn list-backends", "pytest", "attn check acme"):
        assert f"\n  {line}\n" in said
    assert main(["new-backend", "acme"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_command_works_without_torch(world, tmp_path):
    command = ["new-backend", "acme", "--folder", str(tmp_path / "new")]
    run = world.python("-c", f"{WITHOUT_TORCH}from attn_core.cli import main; sys.exit(main({command}))")
    assert run.stderr == ""
    assert files_of(tmp_path / "new" / "acme-attn") == FILES
