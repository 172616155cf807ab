"""What may be loaded, when, and whose: the real ``kernels`` package over repositories that the tests made."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest

kernels = pytest.importorskip("kernels", reason="kernels is not installed: pip install 'attn-hub[hub]'")

import huggingface_hub  # noqa: E402
from kernel_cache import commit_of, write_kernel, write_lock  # noqa: E402
from kernels import resolver  # noqa: E402

from attn_core import attention, list_backends, registry  # noqa: E402
from attn_core.errors import BackendNotUsable  # noqa: E402
from attn_hub import declarations, fetch, fetching  # noqa: E402
from attn_hub.repositories import REPOSITORIES  # noqa: E402

REPOSITORY = REPOSITORIES["flash_hub"].name
COMMIT = commit_of("of this test")
SAYS = "where = 'the cache'"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has fetched nothing and allowed nothing."""
    monkeypatch.setattr(fetching, "_fetched", {})
    for name in ("ATTN_ALLOW_REMOTE_KERNELS", "ATTN_KERNELS_LOCK", "LOCAL_KERNELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """Every request that would leave this machine; none is made."""
    asked = []

    def refuse(*arguments, **options):
        asked.append((arguments, options))
        raise ConnectionError("a test asked the network")

    for name in ("list_repo_tree", "get_organization_overview", "list_repo_refs", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, refuse)
    return asked


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(resolver, "CACHE_DIR", str(tmp_path))
    write_kernel(tmp_path, REPOSITORY, SAYS, commit=COMMIT)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# --- permission -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "0", "true", "yes"])
def test_without_permission_nothing_is_loaded_although_it_is_pinned_and_there(cache, network, monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("ATTN_ALLOW_REMOTE_KERNELS", value)
    with pytest.raises(BackendNotUsable, match="somebody else's code.*not allowed.*ATTN_ALLOW_REMOTE_KERNELS=1"):
        fetch("flash_hub", revision=COMMIT)
    with pytest.raises(BackendNotUsable, match="not allowed"):
        fetching.loaded("flash_hub")
    assert not network


def test_choosing_a_backend_without_permission_is_refused_with_the_next_step(monkeypatch):
    import torch

    monkeypatch.delitem(sys.modules, "attn_hub.flash_2", raising=False)
    monkeypatch.setattr("attn_core.admission.refusals", lambda *_: [])
    query = torch.zeros(1, 8, 1, 8, dtype=torch.float16)
    with pytest.raises(BackendNotUsable, match=r"not allowed.*attn_hub.fetch\('flash_hub', allow_remote"):
        attention(query, query, query, backend="attn-hub:flash_hub")


def test_listing_and_probing_load_nothing_even_with_permission(network, monkeypatch):
    monkeypatch.setenv("ATTN_ALLOW_REMOTE_KERNELS", "1")
    before = set(fetching._fetched)
    rows = [row for row in list_backends() if row.distribution == "attn-hub"]
    assert {row.status for row in rows} == {"available"}
    for row in rows:
        assert registry.probe(row).status == "unsupported"  # there is no GPU here
    assert set(fetching._fetched) == before
    assert not network


def test_importing_the_wheel_imports_neither_torch_nor_kernels():
    code = (
        "import sys, attn_hub.plugin; print([m for m in ('torch', 'kernels', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.strip() == "[]"


def test_a_model_s_configuration_can_t_name_a_kernel(network, monkeypatch):
    transformers = pytest.importorskip("transformers")
    import torch

    from attn_core.integrations.transformers import register

    monkeypatch.setenv("ATTN_ALLOW_REMOTE_KERNELS", "1")
    register("attn")
    asked = {"backend": "flash_hub", "attn_backend": "flash_hub", "kernel": REPOSITORY, "attn_implementation": "attn"}
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, **asked
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert not fetching._fetched
    assert not network


# --- pins -------------------------------------------------------------------------------------------------------------------


PINNED = {name: item.revision for name, item in REPOSITORIES.items() if item.revision is not None}


@pytest.mark.parametrize("name", [name for name in REPOSITORIES if name not in PINNED])
def test_a_backend_without_a_pinned_revision_says_how_to_pin_one(name, network):
    with pytest.raises(BackendNotUsable, match=f"no revision of {REPOSITORIES[name].name} is pinned.*kernels lock"):
        fetch(name, allow_remote_kernels=True)
    assert not network


@pytest.mark.parametrize("name", PINNED)
def test_the_pinned_commit_is_taken_where_the_user_names_no_other(name, cache, offline):
    assert re.fullmatch("[0-9a-f]{40}", PINNED[name])
    with pytest.raises(BackendNotUsable, match=f"at {PINNED[name]} can't be fetched offline"):
        fetch(name, allow_remote_kernels=True)
    write_kernel(cache, REPOSITORIES[name].name, SAYS, commit=PINNED[name])
    assert PINNED[name] in fetch(name, allow_remote_kernels=True).__file__


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT[:12], COMMIT.upper().replace("0", "G"), COMMIT + "0", ""])
def test_a_revision_that_is_no_full_commit_is_refused(revision, network):
    with pytest.raises(BackendNotUsable, match="accepted: a full commit of 40 hex digits"):
        fetch("flash_hub", revision=revision, allow_remote_kernels=True)
    assert not network


def test_a_pinned_kernel_is_taken_from_the_cache_offline(cache, offline):
    module = fetch("flash_hub", revision=COMMIT, allow_remote_kernels=True)
    assert module.where == "the cache"
    assert fetching.loaded("flash_hub") is module  # what was fetched with permission serves the adapter
    assert str(cache) in module.__file__
    assert COMMIT in module.__file__


def test_another_commit_than_the_pinned_one_is_not_taken(cache, offline):
    with pytest.raises(BackendNotUsable, match="can't be fetched offline"):
        fetch("flash_hub", revision="a" * 40, allow_remote_kernels=True)


def test_a_kernel_that_loads_others_needs_a_lock_file(cache, offline):
    other = commit_of("with dependencies")
    depends = [{"repo-id": "kernels-community/other", "revision": commit_of("other")}]
    write_kernel(cache, REPOSITORY, SAYS, commit=other, depends=depends)
    write_kernel(cache, "kernels-community/other", SAYS, commit=commit_of("other"))
    with pytest.raises(
        BackendNotUsable, match=r"loads further kernels \(kernels-community/other\), which a revision does not"
    ):
        fetch("flash_hub", revision=other, allow_remote_kernels=True)
    assert not fetching._fetched


# --- lock files -------------------------------------------------------------------------------------------------------------


def test_a_lock_file_is_honoured_by_argument_and_by_environment(cache, offline, monkeypatch):
    lock = write_lock(cache / "kernels.lock", {REPOSITORY: COMMIT})
    assert COMMIT in fetch("flash_hub", lockfile=lock, allow_remote_kernels=True).__file__
    monkeypatch.setattr(fetching, "_fetched", {})
    monkeypatch.setenv("ATTN_ALLOW_REMOTE_KERNELS", "1")
    monkeypatch.setenv("ATTN_KERNELS_LOCK", str(lock))
    assert COMMIT in fetching.loaded("flash_hub").__file__


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({REPOSITORY: "main"}, "expected 40 or 64 hexadecimal digits: main"),
        (
            {REPOSITORY: COMMIT, "somebody/else": COMMIT},
            "found somebody/else .* accepted publishers: SageAttention, kernels-",
        ),
        ({"kernels-community/another": COMMIT}, "is not locked"),
    ],
)
def test_a_lock_file_that_does_not_pin_is_refused(cache, offline, entries, match):
    lock = write_lock(cache / "kernels.lock", entries)
    with pytest.raises(BackendNotUsable, match=match):
        fetch("flash_hub", lockfile=lock, allow_remote_kernels=True)


def test_a_lock_file_that_is_not_there_is_said_to_be_that(cache, tmp_path, monkeypatch, network):
    absent = tmp_path / "absent.lock"
    with pytest.raises(BackendNotUsable, match=f"the lock file {absent} is not there.*lockfile= or ATTN_KERNELS_LOCK"):
        fetch("flash_hub", lockfile=absent, allow_remote_kernels=True)
    monkeypatch.setenv("ATTN_ALLOW_REMOTE_KERNELS", "1")
    monkeypatch.setenv("ATTN_KERNELS_LOCK", str(absent))
    with pytest.raises(BackendNotUsable, match=f"the lock file {absent} is not there"):
        fetching.loaded("flash_hub")
    assert not network


def test_one_process_has_one_commit_of_a_kernel(cache, offline):
    module = fetch("flash_hub", revision=COMMIT, allow_remote_kernels=True)
    other = write_kernel(cache, REPOSITORY, "where = 'elsewhere'", commit="b" * 40)
    with pytest.raises(
        BackendNotUsable, match=f"found the commit {other}; accepted in this process: {COMMIT}, which is l"
    ):
        fetch("flash_hub", revision=other, allow_remote_kernels=True)
    assert fetching.loaded("flash_hub") is module
    lock = write_lock(cache / "kernels.lock", {REPOSITORY: COMMIT})
    assert fetch("flash_hub", lockfile=lock, allow_remote_kernels=True) is module
    assert fetch("flash_hub", revision=COMMIT, allow_remote_kernels=True) is module


@pytest.mark.parametrize("name", ["flash_varlen_hub", "attn-hub:flash_hub", "attn-hub:flash_varlen_hub"])
def test_every_name_that_backend_takes_can_be_fetched(name, cache, offline):
    module = fetch(name, revision=COMMIT, allow_remote_kernels=True)
    assert fetching.loaded("flash_hub") is module


def test_a_lock_file_in_the_working_directory_is_not_read(cache, offline, monkeypatch):
    write_lock(cache / "kernels.lock", {REPOSITORY: COMMIT})
    monkeypatch.chdir(cache)
    with pytest.raises(BackendNotUsable, match=f"at {PINNED['flash_hub']} can't"):
        fetch("flash_hub", allow_remote_kernels=True)


# --- publishers, downloads, failures ----------------------------------------------------------------------------------------


def test_a_publisher_that_is_not_on_the_list_is_refused(monkeypatch, network):
    monkeypatch.setitem(REPOSITORIES, "flash_hub", REPOSITORIES["flash_hub"]._replace(name="somebody/flash-attn2"))
    with pytest.raises(
        BackendNotUsable, match="found the publisher somebody; accepted: SageAttention, kernels-community"
    ):
        fetch("flash_hub", revision=COMMIT, allow_remote_kernels=True)
    assert not network


def test_what_an_adapter_asks_for_is_never_downloaded(tmp_path, network, monkeypatch):
    monkeypatch.setattr(resolver, "CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ATTN_ALLOW_REMOTE_KERNELS", "1")
    monkeypatch.setenv("ATTN_KERNELS_LOCK", str(write_lock(tmp_path / "kernels.lock", {REPOSITORY: COMMIT})))
    with pytest.raises(BackendNotUsable, match=r"not in the cache of this machine.*attn_hub.fetch\('flash_hub'\)"):
        fetching.loaded("flash_hub")
    assert not network


def test_fetching_asks_the_network_and_tells_what_it_says(tmp_path, network, monkeypatch):
    monkeypatch.setattr(resolver, "CACHE_DIR", str(tmp_path))
    with pytest.raises(BackendNotUsable, match=f"flash_hub: {REPOSITORY} at {COMMIT} can't be fetched: "):
        fetch("flash_hub", revision=COMMIT, allow_remote_kernels=True)
    assert network


def test_a_kernel_that_raises_when_imported_is_told_and_not_kept(cache, offline):
    broken = commit_of("broken")
    write_kernel(cache, REPOSITORY, "raise OSError('libcudart.so.13: cannot open')", commit=broken)
    with pytest.raises(BackendNotUsable, match="libcudart.so.13: cannot open"):
        fetch("flash_hub", revision=broken, allow_remote_kernels=True)
    assert fetch("flash_hub", revision=COMMIT, allow_remote_kernels=True).where == "the cache"


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(BackendNotUsable, match="attn-hub has no backend 'flash'; it has flash_hub, flash_3_hub"):
        fetch("flash", allow_remote_kernels=True)


def test_each_declared_backend_has_a_repository():
    names = {spec.name for spec in importlib.import_module("attn_hub.plugin").attn_backends()}
    assert names == set(REPOSITORIES)
    assert declarations.FLASH.unverified


def test_without_kernels_the_rows_are_missing_with_a_line_that_installs_it(monkeypatch):
    from attn_core import requirements

    there = {name: item for name, item in requirements.installed().items() if name != "kernels"}
    monkeypatch.setattr(requirements, "installed", lambda: there)
    registry.refresh()
    try:
        rows = [row for row in registry.rows() if row.distribution == "attn-hub"]
        assert {(row.status, row.next_step) for row in rows} == {("missing", "pip install 'attn-hub[hub]'")}
    finally:
        monkeypatch.undo()
        registry.refresh()


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
