"""Every distribution, whole or not, gets its row or is rightly ignored, and leaves every other row intact."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from itertools import permutations

import fake_distributions
import pytest
from fake_distributions import HEAD, declaring, written

from attn_core import installed, registry

world = fake_distributions.world

NEIGHBOURS = [("before", "available"), ("zafter", "available")]


@pytest.fixture
def neighbours(world):
    """Two healthy wheels, one on each side of what is tried."""
    world.wheel("aaa-before", declaring("'before'"))
    world.wheel("zzz-after", declaring("'zafter'"))
    return world


def others(rows, *names):
    return [(row.name, row.status) for row in rows if row.name not in names]


def tried(world, name="mmm-tried"):
    """The row of what is tried, the neighbours being well."""
    rows = world.rows()
    assert [item for item in ((row.name, row.status) for row in rows) if item in NEIGHBOURS] == NEIGHBOURS
    (row,) = [row for row in rows if row.distribution == name]
    return row


# --- wheels that are well -----------------------------------------------------------------------------------------------


def test_a_wheel_brings_several_backends_with_its_version_and_normalised_name(world):
    world.wheel("Acme_Attn", declaring("'acme'", "'acme_packed', aliases={'acme_varlen'}"), version="0.3.0")
    rows = world.rows()
    assert [(row.name, row.status, row.distribution, row.version) for row in rows] == [
        ("acme", "available", "acme-attn", "0.3.0"),
        ("acme_packed", "available", "acme-attn", "0.3.0"),
    ]
    assert rows[1].aliases == ("acme_varlen",)
    assert rows[1].qualified_name == "acme-attn:acme_packed"
    assert (rows[0].reason, rows[0].next_step) == ("", "")


def test_a_wheel_may_have_several_entry_points_and_a_module_named_twice_is_asked_once(world):
    (world.folders[0] / "acme_more.py").write_text(declaring("'more'"))
    points = "[attn.backends]\nacme = acme_declaration\nagain = acme_declaration\nmore = acme_more\n"
    world.wheel("acme", declaring("'acme', constraints=Constraints(platforms={'cpu'}, dtypes={'float32'}, masks={'none'}, "
                                  "rules=[Rule('never', lambda facts: False)])"), entry_points=points)  # fmt: skip
    assert world.statuses() == [("acme", "available"), ("more", "available")]


def test_two_entry_points_that_declare_a_name_each_in_its_way_are_broken_for_that_name_alone(world):
    (world.folders[0] / "acme_more.py").write_text(declaring("'acme', summary='another'", "'more'"))
    world.wheel("acme", declaring("'acme'"), entry_points="[attn.backends]\na = acme_declaration\nb = acme_more\n")
    assert world.statuses() == [("acme", "broken"), ("more", "available")]
    assert "two of its entry points" in world.rows()[0].reason


def test_records_that_raise_where_they_are_compared_are_taken_for_different_ones(neighbours):
    source = written("""
        class Odd(Constraints):
            def __eq__(self, other):
                raise RuntimeError("never equal")

            __hash__ = None

        @hookimpl
        def attn_backends():
            odd = Odd(platforms={"cpu"}, dtypes={"float32"}, masks={"none"})
            yield spec("acme", constraints=odd)
    """)
    (neighbours.folders[0] / "acme_more.py").write_text(source)
    points = "[attn.backends]\na = mmm_tried_declaration\nb = acme_more\n"
    neighbours.wheel("mmm-tried", source, entry_points=points)
    row = tried(neighbours)
    assert (row.name, row.status) == ("acme", "broken")
    assert "two of its entry points" in row.reason


def test_an_entry_point_may_name_an_object_and_a_function_may_have_another_name(world):
    source = written("""
        class Wheel:
            @hookimpl(specname="attn_backends", tryfirst=True)
            def whatever(self):
                return [spec("acme")]

        wheel = Wheel()
    """)
    world.wheel("acme", source, entry_points="[attn.backends]\nacme = acme_declaration:wheel\n")
    assert world.statuses() == [("acme", "available")]


def test_a_wheel_that_declares_nothing_has_no_row(world):
    world.wheel("acme", written("@hookimpl\ndef attn_backends():\n    return []\n"))
    world.distribution("other", entry_points="[console_scripts]\nattn.backends = other:main\n")
    assert world.rows() == ()


# --- wheels that are broken ----------------------------------------------------------------------------------------------

BROKEN = {
    "an import that fails": (
        "import acme_config",
        "its declaration raises ModuleNotFoundError: No module named 'acme_config'",
    ),
    "exit at import": ("import sys; sys.exit(3)", "raises SystemExit: 3"),
    "exit in the hook": (
        written("@hookimpl\ndef attn_backends():\n    raise SystemExit('no licence')\n"),
        "SystemExit: no licence",
    ),
    "error in the hook": (
        written("@hookimpl\ndef attn_backends():\n    return 1 / 0\n"),
        "ZeroDivisionError: division by zero",
    ),
    "error half way": (
        written("@hookimpl\ndef attn_backends():\n    yield spec('half')\n    raise OSError('gone')\n"),
        "raises OSError: gone",
    ),
    "exit half way": (
        written("@hookimpl\ndef attn_backends():\n    yield spec('half')\n    exit()\n"),
        "raises SystemExit",
    ),
    "an error that is no Exception": ("class Odd(BaseException): pass\nraise Odd('well')", "Odd: well"),
    "an error without words": ("class Odd(Exception):\n    def __str__(self): return 1 / 0\nraise Odd", "Odd"),
    "an error in red": ("raise ValueError('\\x1b[31mred\\x1b[0m\\nand more')", "ValueError: [31mred[0m and more"),
    "no Python": ("def attn_backends(:", "raises SyntaxError"),
    "a wrong record": (
        declaring("'Acme'"),
        "raises attn_core.declaration.DeclarationError: BackendSpec: a name is a plain word",
    ),
    "an unknown field": (declaring("'acme', shiny=True"), "unexpected keyword argument 'shiny'"),
    "returns None": (written("@hookimpl\ndef attn_backends():\n    spec('acme')\n"), "returns None from attn_backends"),
    "returns one": (
        written("@hookimpl\ndef attn_backends():\n    return spec('acme')\n"),
        "returns a BackendSpec from",
    ),
    "returns a number": (written("@hookimpl\ndef attn_backends():\n    return 3\n"), "returns a int from"),
    "returns text": (written("@hookimpl\ndef attn_backends():\n    return 'acme'\n"), "has a str among its backends"),
    "yields something else": (
        written("@hookimpl\ndef attn_backends():\n    yield {'name': 'acme'}\n"),
        "has a dict among",
    ),
    "yields a record of a class of its own": (
        written("""
            class Mine(BackendSpec):
                def __eq__(self, other):
                    raise RuntimeError("never equal")

                __hash__ = None

            @hookimpl
            def attn_backends():
                yield Mine(api=1, name="acme", summary="Acme", forward="nowhere:forward", constraints=PLAIN)
        """),
        "has a Mine among its backends; each is a BackendSpec itself",
    ),
    "never ends": (
        written("@hookimpl\ndef attn_backends():\n    while True: yield spec('acme')\n"),
        "more than 1000 backends",
    ),
    "a name twice": (declaring("'acme'", "'acme'"), "has two backends named 'acme'"),
    "no hook": (HEAD, "does not implement the hook attn_backends"),
    "an undecorated hook": (written("def attn_backends():\n    return [spec('acme')]\n"), "not marked with @hookimpl"),
    "a mistyped hook": (
        written("@hookimpl\ndef attn_backend():\n    return [spec('acme')]\n"),
        "unknown hook 'attn_backend'",
    ),
    "a mistyped hook beside the right one": (
        declaring("'acme'") + "\n@hookimpl\ndef attn_backend():\n    return []\n",
        "the hook of attn is attn_backends",
    ),
    "a hook with an argument": (written("@hookimpl\ndef attn_backends(core):\n    return []\n"), "core"),
    "a wrapper": (
        written("@hookimpl(wrapper=True)\ndef attn_backends():\n    return (yield)\n"),
        "wraps attn_backends",
    ),
    "an old wrapper": (
        written("@hookimpl(hookwrapper=True)\ndef attn_backends():\n    yield\n"),
        "wraps attn_backends",
    ),
    "asks for the list": ("from attn_core import registry\nregistry.rows()", "a declaration asked for the list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_declaration_is_one_broken_row_and_prints_nothing(neighbours, case, capfd):
    source, reason = BROKEN[case]
    neighbours.wheel("mmm-tried", source)
    row = tried(neighbours)
    assert (row.name, row.status, row.spec) == ("mmm-tried", "broken", None)
    assert reason in row.reason
    assert row.reason.isprintable()
    assert "ATTN_DISABLE=mmm-tried" in row.next_step
    assert capfd.readouterr() == ("", "")


def test_what_one_entry_point_does_wrong_leaves_the_others_of_its_wheel(world):
    (world.folders[0] / "acme_typo.py").write_text(written("@hookimpl\ndef attn_backend():\n    return []\n"))
    (world.folders[0] / "acme_wraps.py").write_text(
        written("@hookimpl(wrapper=True)\ndef attn_backends():\n    return [(yield), 1 / 0]\n")
    )
    points = "[attn.backends]\na = acme_typo\nb = acme_wraps\nc = acme_declaration\n"
    world.wheel("acme", declaring("'acme'"), entry_points=points)
    assert world.statuses() == [("a", "broken"), ("acme", "available"), ("b", "broken")]


def test_ctrl_c_goes_on_and_nothing_is_remembered_of_the_cut_off_look(neighbours):
    neighbours.wheel("mmm-tried", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        neighbours.rows()
    with pytest.raises(KeyboardInterrupt):
        registry.rows()


def test_metadata_without_its_module_is_half_installed(neighbours):
    neighbours.wheel("mmm-tried", None)
    row = tried(neighbours)
    assert row.status == "broken"
    assert "half installed" in row.reason
    assert "mmm_tried_declaration" in row.reason
    assert row.next_step == "pip install --force-reinstall --no-deps mmm-tried"


def test_a_folder_that_is_left_of_the_module_is_half_installed_too(neighbours):
    neighbours.wheel("mmm-tried", None)
    (neighbours.folders[0] / "mmm_tried_declaration" / "__pycache__").mkdir(parents=True)
    row = tried(neighbours)
    del sys.modules["mmm_tried_declaration"]  # a namespace has no file by which the world would know it
    assert row.status == "broken"
    assert "half installed" in row.reason
    assert row.next_step == "pip install --force-reinstall --no-deps mmm-tried"


# --- metadata that can't be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [False, b"", "\n", "A text.\n", b"Name: \xff\xfe", "Name: x\nRequires-Dist: @@@ what\n"],
    ids=["absent", "empty", "blank", "something else", "bytes", "nonsense"],
)
def test_a_wheel_whose_metadata_can_not_be_read_is_broken_and_not_run(neighbours, metadata):
    neighbours.wheel("mmm-tried", declaring("'tried'"), metadata=metadata)
    row = tried(neighbours)
    assert row.status == "broken"
    assert "its metadata can't be read" in row.reason
    assert "--force-reinstall" in row.next_step
    assert "mmm_tried_declaration" not in sys.modules


@pytest.mark.parametrize("header", ["\ufeff[attn.backends]", "[attn.backends", "attn.backends]"])
def test_a_spoilt_header_is_a_broken_row(neighbours, header):
    text = f"{header}\nacme = mmm_tried_declaration\n"
    neighbours.wheel("mmm-tried", declaring("'tried'"), entry_points=text.encode())
    row = tried(neighbours)
    assert (row.name, row.status) == ("mmm-tried", "broken")
    assert "where [attn.backends] is meant" in row.reason or row.reason == "its entry_points.txt can't be read"


def test_a_group_without_entries_is_no_row(neighbours):
    neighbours.wheel("mmm-tried", declaring("'tried'"), entry_points="# attn.backends\n[attn.backends]\n[other]\n")
    assert {row.distribution for row in neighbours.rows()}.isdisjoint({"mmm-tried"})


@pytest.mark.parametrize(
    "text",
    [
        "[attn.backends]\nno pair at all\n",
        "[attn.backends]\nacme = two words !\n",
        "[console_scripts]\nno pair at all\n[attn.backends]\nacme = mmm_tried_declaration\n",
        b"[attn.backends]\nacme = \xff\xfe\n",
    ],
    ids=["no pair", "no module", "no pair in another group", "bytes"],
)
def test_entry_points_of_ours_that_can_not_be_read_are_a_broken_row(neighbours, text):
    neighbours.wheel("mmm-tried", declaring("'tried'"), entry_points=text)
    row = tried(neighbours)
    assert (row.name, row.status) == ("mmm-tried", "broken")
    assert row.reason == "its entry_points.txt can't be read"


@pytest.mark.parametrize(
    "text",
    ["[console_scripts]\nno pair at all\n", b"\xff\xfe\x00", "= = =\n[[[\n"],
    ids=["no pair", "bytes", "nonsense"],
)
def test_metadata_of_others_that_can_not_be_read_is_ignored(neighbours, text):
    neighbours.distribution("mmm-other", entry_points=text, metadata=b"\xff")
    (neighbours.folders[0] / "mmm_empty-1.0.dist-info").mkdir()
    (neighbours.folders[0] / "mmm_file-1.0.dist-info").write_bytes(b"\xff")
    (neighbours.folders[0] / ".dist-info").mkdir()
    assert neighbours.statuses() == NEIGHBOURS


# --- another core --------------------------------------------------------------------------------------------------------


def test_a_wheel_that_needs_another_core_is_incompatible_and_not_imported(neighbours):
    neighbours.distribution("attn-core", "0.1.0")
    neighbours.wheel("mmm-tried", declaring("'tried'"), requires=["attn-core>=0.2,<0.3"])
    row = tried(neighbours)
    assert row.status == "incompatible"
    assert row.reason == "needs attn-core<0.3,>=0.2, found 0.1.0"
    assert "pip install 'attn-core<0.3,>=0.2'" in row.next_step
    assert "mmm_tried_declaration" not in sys.modules


def test_a_requirement_on_the_core_that_is_met_or_not_meant_for_this_python_is_no_obstacle(neighbours):
    neighbours.distribution("Attn_Core", "0.1.0.dev3+local")
    neighbours.wheel(
        "mmm-tried", declaring("'tried'"), requires=["attn_core>=0.1.0.dev1", "attn-core>=9; python_version<'3'"]
    )
    assert tried(neighbours).status == "available"


def test_a_declaration_of_a_later_version_of_the_meanings_is_incompatible(neighbours):
    neighbours.wheel("mmm-tried", declaring("'tried', api=2"))
    row = tried(neighbours)
    assert (row.name, row.status, row.next_step) == ("tried", "incompatible", "pip install --upgrade attn-core")
    assert "version 2 of the meanings" in row.reason


# --- switched off --------------------------------------------------------------------------------------------------------

MARK = "import sys\nsys.ran = [*getattr(sys, 'ran', ()), __name__]\n"


@pytest.fixture
def two_wheels(world, monkeypatch):
    monkeypatch.setattr(sys, "ran", [], raising=False)
    world.wheel("acme-attn", MARK + declaring("'acme', aliases={'acme_old'}", "'acme_packed'"))
    world.wheel("other-attn", MARK + declaring("'other'"))
    return world


A, O = "acme_attn_declaration", "other_attn_declaration"  # noqa: E741


@pytest.mark.parametrize(
    ("variable", "value", "on", "ran"),
    [
        ("DISABLE", "acme-attn", ["other"], [O]),
        ("DISABLE", "Acme_Attn, nobody", ["other"], [O]),
        ("DISABLE", "acme", ["acme_packed", "other"], [A, O]),
        ("DISABLE", "acme_old", ["acme_packed", "other"], [A, O]),
        ("DISABLE", "acme-attn:acme_packed", ["acme", "other"], [A, O]),
        ("DISABLE", "other-attn:acme", ["acme", "acme_packed", "other"], [A, O]),
        ("DISABLE", " , ", ["acme", "acme_packed", "other"], [A, O]),
        ("ONLY", "acme-attn", ["acme", "acme_packed"], [A]),
        ("ONLY", "acme-attn:acme_packed", ["acme_packed"], [A]),
        ("ONLY", "acme_packed", ["acme_packed"], [A, O]),
        ("ONLY", "not-installed", [], []),
        ("ONLY", "other-attn,acme-attn:acme", ["acme", "other"], [A, O]),
        ("ONLY", "", ["acme", "acme_packed", "other"], [A, O]),
    ],
)
def test_a_disabled_distribution_does_not_run_and_a_disabled_backend_only_has_its_row(
    two_wheels, monkeypatch, variable, value, on, ran
):
    monkeypatch.setenv(f"ATTN_{variable}", value)
    rows = two_wheels.rows()
    assert [row.name for row in rows if row.status == "available"] == on
    assert sys.ran == ran
    for row in rows:
        if row.status != "available":
            assert row.status == "disabled"
            assert f"ATTN_{variable}" in row.reason
            assert f"ATTN_{variable}" in row.next_step


def test_only_a_known_wheels_backend_runs_that_wheel_alone(two_wheels, monkeypatch):
    two_wheels.wheel("attn-native", MARK + declaring("'native'", "'native_math'"))
    monkeypatch.setenv("ATTN_ONLY", "native_math")
    assert [row.name for row in two_wheels.rows() if row.status == "available"] == ["native_math"]
    assert sys.ran == ["attn_native_declaration"]


def test_disable_wins_over_only(two_wheels, monkeypatch):
    monkeypatch.setenv("ATTN_ONLY", "acme-attn")
    monkeypatch.setenv("ATTN_DISABLE", "acme-attn")
    assert {row.status for row in two_wheels.rows()} == {"disabled"}
    assert sys.ran == []


# --- installed more than once --------------------------------------------------------------------------------------------


def test_a_stray_egg_info_of_the_same_version_changes_nothing(world):
    second = world.path("second")
    world.wheel("acme", declaring("'acme'"), requires=["missing-thing"])
    world.wheel("acme", folder=second, label="acme.egg-info")
    for order in permutations(world.folders):
        world.order(order)
        assert [(row.name, row.version) for row in world.rows()] == [("acme", "1.0")]


def test_an_egg_info_alone_is_read_with_its_requirements(world):
    info = world.wheel("acme", declaring("'acme'"), label="acme.egg-info")
    (info / "requires.txt").write_text("missing-thing>=2\n")
    row = world.row()
    assert (row.status, row.version, row.reason) == ("missing", "1.0", "needs missing-thing>=2")


def test_of_two_versions_the_first_on_the_path_counts_and_the_row_says_so(world):
    second = world.path("second")
    world.wheel("acme", declaring("'acme'", "'new'"), version="2.0")
    world.wheel("acme", declaring("'acme'", "'old'"), version="1.0", folder=second)
    rows = world.rows()
    assert [(row.name, row.version, row.status) for row in rows] == [
        ("acme", "2.0", "available"),
        ("new", "2.0", "available"),
    ]
    assert rows[0].reason == f"also installed, and not used, is version 1.0 in {second}"
    for name in world.modules():
        del sys.modules[name]
    world.order(reversed(world.folders))
    assert [(row.name, row.version) for row in world.rows()] == [("acme", "1.0"), ("old", "1.0")]


def test_a_version_without_our_entry_point_hides_a_later_one_on_the_path(world):
    second = world.path("second")
    world.distribution("acme", "2.0")
    world.wheel("acme", declaring("'acme'"), version="1.0", folder=second)
    assert world.rows() == ()


def test_of_two_in_one_folder_the_whole_one_counts_then_the_newest(world):
    world.wheel("acme", declaring("'acme'"), version="1.9")
    world.wheel("acme", version="1.10")
    world.wheel("acme", version="2.0", metadata=b"")
    world.wheel("acme", version="3.0", label="acme-3.0-py3.11.egg-info")
    assert world.row().version == "1.10"


def test_what_pip_was_about_to_remove_is_ignored(world):
    world.wheel("acme", declaring("'acme'"), label="~cme-0.9.dist-info")
    assert world.rows() == ()


def test_a_folder_twice_on_the_path_counts_once(world):
    world.wheel("acme", declaring("'acme'"))
    world.order([*world.folders, *world.folders])
    assert world.row().reason == ""


# --- the same whatever the order, the seed and the library -----------------------------------------------------------------


def zoo(world, reverse=False):
    """One of many kinds, spread over three folders, installed in one order or the other."""
    folders = [world.folders[0], world.path("second"), world.path("third")]
    wheels = [
        ("good", declaring("'good', aliases={'g1', 'g2', 'g3'}, constraints=[PLAIN, "
                           "Constraints(platforms={'cuda', 'rocm', 'cpu'}, dtypes={'float16', 'bfloat16'}, "
                           "masks={'none', 'bool'}, head_dims={64, 128, (192, 128)}, "
                           "compute_capability={(8, 0), (9, 0)})]"), {}),
        ("claims-one", declaring("'claimed'"), {}),
        ("claims-two", declaring("'claimed'"), {}),
        ("raises", "raise ValueError", {}),
        ("later", declaring("'later', api=3"), {}),
        ("missing", declaring("'missing'"), {"requires": ["nothing-here>=2", "nor-here"]}),
        ("unreadable", declaring("'unreadable'"), {"metadata": b"\xff"}),
        ("odd-points", declaring("'odd'"), {"entry_points": "[attn.backends]\nwhat\n"}),
        ("half", None, {}),
    ]  # fmt: skip
    placed = list(zip(wheels, folders * 3, strict=True))
    for (name, source, more), folder in reversed(placed) if reverse else placed:
        world.wheel(name, source, folder=folder, **more)


def test_the_result_depends_neither_on_installation_order_nor_on_path_order_nor_on_the_hash_seed(tmp_path, monkeypatch):
    from fake_distributions import World

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    results = set()
    for reverse in (False, True):
        folder = tmp_path / str(reverse)
        folder.mkdir()
        world = World(folder, monkeypatch)
        zoo(world, reverse=reverse)
        for seed, order in enumerate(list(permutations(world.folders))[:: 2 if reverse else 1]):
            world.folders = list(order)
            run = world.run("list-backends", "--json", PYTHONHASHSEED=str(seed), PYTHONDONTWRITEBYTECODE="1")
            assert run.stderr == ""
            results.add(run.stdout)
    assert len(results) == 1
    statuses = {
        row["name"]: row["status"] for row in json.loads(results.pop()) if not row["distribution"].startswith("attn-")
    }
    assert statuses == {
        "claimed": "ambiguous", "good": "available", "half": "broken", "later": "incompatible", "missing": "missing",
        "odd-points": "broken", "raises": "broken", "unreadable": "broken",
    }  # fmt: skip


def test_the_standard_librarys_metadata_and_the_backport_have_the_same_outcome(world, monkeypatch):
    backport = pytest.importorskip("importlib_metadata")
    zoo(world)
    results = []
    for library in (importlib.metadata, backport):
        monkeypatch.setattr(installed, "metadata", library)
        world.order(world.folders)
        results.append(world.rows())
        for name in world.modules():
            del sys.modules[name]
    first, second = (
        [(row.name, row.status, row.reason, row.next_step, row.version) for row in rows] for rows in results
    )
    assert first == second
    assert len(first) == 9
