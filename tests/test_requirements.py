"""What a backend needs is read from its distribution, with markers, extras, local versions and pre-releases."""

from __future__ import annotations

import sys

import fake_distributions
import pytest
from fake_distributions import declaring

from attn_core import requirements

world = fake_distributions.world


def row_of(world, needs="'kernel'", requires=(), **changes):
    more = "".join(f", {name}={text}" for name, text in changes.items())
    world.wheel(
        "acme-attn", declaring(f"'acme', needs={needs}{more}"), requires=requires, extras=["kernel", "Other_Kernel"]
    )
    return world.row()


@pytest.mark.parametrize(
    ("asked", "version", "status", "reason"),
    [
        ("flash-attn>=2.6", None, "missing", "needs flash-attn>=2.6"),
        ("flash-attn>=2.6", "2.8.3+cu12", "available", ""),
        ("flash-attn==2.8.3", "2.8.3+cu12torch2.7cxx11abiTRUE", "available", ""),
        ("flash-attn>=2.6,!=2.8.*", "2.8.3+cu12", "incompatible", "needs flash-attn!=2.8.*,>=2.6, found 2.8.3+cu12"),
        ("flash-attn>=4.0.0b1", "4.0.0b36", "available", ""),
        ("flash-attn>=3", "4.0.0b36", "available", ""),
        ("flash-attn>=4", "4.0.0b36", "incompatible", "needs flash-attn>=4, found 4.0.0b36"),
        ("Flash_Attn>=2.6", "2.5", "incompatible", "needs Flash_Attn>=2.6, found 2.5"),
        ("flash-attn", "not.a-version", "available", ""),
        ("flash-attn>=1", "odd", "incompatible", "needs flash-attn>=1, found odd"),
        ("flash-attn @ https://example.org/flash.whl", "2.5", "available", ""),
    ],
)
def test_an_extra_is_held_against_what_is_installed(world, asked, version, status, reason):
    if version is not None:
        world.distribution("flash_attn", version)
    found = row_of(world, requires=[f"{asked} ; extra == 'kernel'"])
    assert (found.status, found.reason) == (status, reason)
    assert found.next_step == ("" if status == "available" else "pip install 'acme-attn[kernel]'")


def test_markers_of_other_systems_and_other_extras_do_not_count(world):
    lines = [
        "only-there; sys_platform == 'nowhere' and extra == 'kernel'",
        "only-then; python_version < '3' and extra == 'kernel'",
        "for-another; extra == 'other-kernel'",
    ]
    assert row_of(world, requires=lines).status == "available"


def test_fields_may_be_folded_in_any_case_and_the_description_is_no_field(world):
    lines = "NAME: acme-attn\r\nVersion: 1.0\r\nrequires-dist: gone\r\n  >=2\r\n\r\nRequires-Dist: nor-this\r\n"
    world.wheel("acme-attn", declaring("'acme'"), metadata=lines.encode())
    assert world.row().reason == "needs gone>=2"


def test_extras_are_normalised_and_may_refer_to_each_other_and_to_those_of_others(world):
    world.distribution("middle", requires=["deep>=2; extra == 'far'"], extras=["far"])
    lines = ["acme-attn[other_kernel]; extra == 'kernel'", "middle[far]; extra == 'other-kernel'"]
    found = row_of(world, requires=lines)
    assert (found.status, found.reason) == ("missing", "needs deep>=2")
    world.distribution("deep", "3")
    assert world.row().status == "available"


def test_the_authors_own_install_line_is_given(world):
    line = "pip install --no-build-isolation flash-attn (builds with nvcc)"
    found = row_of(world, f"Needs(extra='kernel', install={line!r})", ["flash-attn>=2.6; extra == 'kernel'"])
    assert (found.status, found.reason, found.next_step) == ("missing", "needs flash-attn>=2.6", line)


def test_everything_that_is_unmet_is_named(world):
    world.distribution("old", "1")
    found = row_of(world, requires=["old>=2; extra == 'kernel'", "gone; extra == 'kernel'"])
    assert (found.status, found.reason) == ("missing", "needs old>=2, found 1; needs gone")


def test_an_extra_that_the_distribution_does_not_have_is_broken(world):
    found = row_of(world, "Needs(extra='kernels')")
    assert found.status == "broken"
    assert "'kernels'" in found.reason
    assert "kernel, other-kernel" in found.reason


@pytest.mark.parametrize("needs", ["'acme_cuda.ops'", "Needs(module='acme_cuda.ops', install='make install')"])
def test_a_module_is_found_without_running_its_parents(world, needs):
    found = row_of(world, needs)
    assert (found.status, found.reason) == ("missing", "needs the module acme_cuda.ops")
    assert found.next_step == ("make install" if "make" in needs else found.next_step)
    assert found.next_step
    package = world.folders[0] / "acme_cuda"
    package.mkdir()
    assert world.row().status == "missing", "an empty folder is no module"
    (package / "ops").mkdir()
    assert world.row().status == "missing", "nor is a folder in a folder"
    (package / "ops" / "deep").mkdir()
    (package / "ops" / "deep" / "__init__.py").write_text("raise RuntimeError('run')")
    assert requirements.module_is_there("acme_cuda.ops.deep")
    (package / "ops.py").write_text("raise RuntimeError('run')")
    (package / "__init__.py").write_text("raise RuntimeError('run')")
    assert world.row().status == "available"
    assert not {"acme_cuda", "acme_cuda.ops"} & set(sys.modules)


def test_a_stand_in_among_the_modules_does_not_upset_the_search(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "acme_cuda", type(sys)("acme_cuda"))
    monkeypatch.setitem(sys.modules, "acme_none", None)
    assert requirements.module_is_there("acme_cuda")
    assert not requirements.module_is_there("acme_cuda.ops")
    assert not requirements.module_is_there("acme_none")
    assert not requirements.module_is_there("acme_none.ops")


def test_what_the_wheel_itself_requires_is_checked_without_importing_it(world):
    world.distribution("torch", "2.5.1+cu124")
    world.wheel(
        "acme-attn", declaring("'acme'"), requires=["torch>=2.6", "attn-core>=0.1", "tomli; python_version<'3'"]
    )
    found = world.row()
    assert (found.status, found.reason) == ("incompatible", "needs torch>=2.6, found 2.5.1+cu124")
    assert found.next_step == "pip install 'torch>=2.6'"
    assert found.spec is not None


WITH = "Constraints(platforms={'cpu'}, dtypes={'float32'}, masks={'none'}, library="


@pytest.mark.parametrize(
    ("version", "status", "reason"),
    [
        (None, "missing", "needs lib>=3 or needs lib<2"),
        ("2.5", "incompatible", "needs lib>=3, found 2.5 or needs lib<2, found 2.5"),
        ("3.0", "available", ""),
        ("1.0", "available", ""),
    ],
)
def test_one_alternative_whose_library_is_there_is_enough(world, version, status, reason):
    if version is not None:
        world.distribution("lib", version)
    world.wheel("acme-attn", declaring(f"'acme', constraints=[{WITH}'lib>=3'), {WITH}'lib<2')]"))
    found = world.row()
    assert (found.status, found.reason) == (status, reason)


def test_an_alternative_without_a_library_is_enough(world):
    world.wheel("acme-attn", declaring(f"'acme', constraints=[{WITH}'lib>=3'), PLAIN]"))
    assert world.row().status == "available"


def test_library_reason_says_found_and_asked(world):
    world.distribution("lib", "2.5")
    assert requirements.library_reason("lib>=2") is None
    assert requirements.library_reason("lib>=3") == "needs lib>=3, found 2.5"
    assert requirements.library_reason("gone>=3") == "needs gone>=3, which is not installed"
