"""Which backend a name means, and what people are told when it means none or several."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import fake_distributions
import pytest
from fake_distributions import declaring

from attn_core import BackendNotUsable, list_backends, registry

world = fake_distributions.world


def refusal(name):
    with pytest.raises(BackendNotUsable) as caught:
        registry.find(name)
    return str(caught.value)


def test_name_alias_and_qualified_name_find_the_same_row(world):
    world.wheel("Acme_Attn", declaring("'acme', aliases={'acme_old'}"))
    world.rows()
    names = ["acme", "acme_old", "acme-attn:acme", "Acme.Attn:acme_old"]
    assert {registry.find(name).qualified_name for name in names} == {"acme-attn:acme"}
    assert all(map(registry.knows, names))
    assert not registry.knows("other-attn:acme")


def test_a_name_that_two_claim_is_won_by_neither_and_the_qualified_names_work(world):
    world.wheel("acme-one", declaring("'acme'", "'one'"))
    world.wheel("acme-two", declaring("'acme'", "'two'"))
    assert world.statuses() == [
        ("acme", "ambiguous"),
        ("acme", "ambiguous"),
        ("one", "available"),
        ("two", "available"),
    ]
    for row in registry.rows()[:2]:
        assert row.reason == "claimed by acme-one and acme-two"
        assert row.next_step == "write acme-one:acme or acme-two:acme, or switch one off with ATTN_DISABLE"
    message = refusal("acme")
    assert "acme-one:acme" in message
    assert "acme-two:acme" in message
    assert registry.find("acme-one:acme").distribution == "acme-one"
    assert registry.find("acme-two:acme").distribution == "acme-two"
    assert registry.find("acme-one:acme").status == "available"


@pytest.mark.parametrize("disable", ["acme-two", "acme-two:acme"])
def test_switching_one_claimant_off_settles_it(world, monkeypatch, disable):
    world.wheel("acme-one", declaring("'acme'"))
    world.wheel("acme-two", declaring("'acme'"))
    monkeypatch.setenv("ATTN_DISABLE", disable)
    world.rows()
    assert registry.find("acme").distribution == "acme-one"
    assert "ATTN_DISABLE" in refusal(disable.partition(":")[0] + (":acme" if ":" in disable else ":acme-two"))


def test_a_claim_counts_even_where_what_it_needs_is_missing(world):
    world.wheel("acme-one", declaring("'acme'"))
    world.wheel("acme-two", declaring("'acme', needs='no_such_module'"))
    assert {row.status for row in world.rows()} == {"ambiguous"}
    assert "no_such_module" in refusal("acme-two:acme")


def test_a_wheel_that_is_broken_takes_nobodys_name(world):
    world.wheel("acme-one", declaring("'acme'"))
    world.wheel("acme-two", "raise ValueError", entry_points="[attn.backends]\nacme = acme_two_declaration\n")
    assert world.statuses() == [("acme", "available"), ("acme", "broken")]
    assert registry.find("acme").distribution == "acme-one"
    assert "ValueError" in refusal("acme-two:acme")


def test_two_aliases_are_ambiguous(world):
    world.wheel("acme-one", declaring("'acme', aliases={'fast'}"))
    world.wheel("acme-two", declaring("'second', aliases={'fast'}"))
    world.rows()
    message = refusal("fast")
    assert "acme-one:acme" in message
    assert "acme-two:second" in message
    assert registry.find("acme-one:fast").name == "acme"
    assert {row.status for row in registry.rows()} == {"available"}


def test_a_name_does_not_take_over_what_another_wheel_has_as_an_alias(world, monkeypatch):
    world.wheel("acme-one", declaring("'acme', aliases={'second'}"))
    world.rows()
    assert registry.find("second").name == "acme"
    world.wheel("acme-two", declaring("'second'"))
    world.rows()
    message = refusal("second")
    assert "acme-one:acme" in message
    assert "acme-two:second" in message
    assert {row.name: row.status for row in registry.rows()} == {"acme": "available", "second": "ambiguous"}
    assert registry.find("acme").name == "acme"
    assert registry.find("acme-one:second").name == "acme"
    assert registry.find("acme-two:second").name == "second"
    monkeypatch.setenv("ATTN_DISABLE", "acme-one")
    world.rows()
    assert registry.find("second").distribution == "acme-two"


def test_in_one_wheel_a_name_beats_an_alias(world):
    world.wheel("acme-one", declaring("'acme', aliases={'second'}", "'second'"))
    world.rows()
    assert registry.find("second").name == "second"


def test_an_alias_never_stands_in_for_a_name_that_is_switched_off(world, monkeypatch):
    world.wheel("acme-one", declaring("'acme'"))
    world.wheel("acme-two", declaring("'two', aliases={'acme'}"))
    monkeypatch.setenv("ATTN_DISABLE", "acme-one:acme")
    world.rows()
    assert "disabled" in refusal("acme")


@pytest.mark.parametrize(
    ("asked", "meant"), [("acmee", "acme"), ("ACME", "acme"), ("flsh", "flash"), ("acme_odl", "acme_old")]
)
def test_a_typing_error_gets_a_suggestion(world, asked, meant):
    world.wheel("acme-attn", declaring("'acme', aliases={'acme_old'}"))
    world.rows()
    assert f"Did you mean {meant!r}?" in refusal(asked)
    assert registry.close_match(asked) == meant
    assert not registry.knows(asked)


def test_a_mistyped_qualified_name_gets_one_too(world):
    world.wheel("acme-attn", declaring("'acme'"))
    world.rows()
    assert "Did you mean 'acme-attn:acme'?" in refusal("acme-atn:acme")


def test_a_name_that_is_like_no_other_gets_the_list(world):
    world.wheel("acme-attn", declaring("'acme'"))
    world.rows()
    message = refusal("zzzzzz")
    assert registry.close_match("zzzzzz") is None
    assert "Known here: acme." in message
    assert "attn list-backends" in message


def test_a_known_wheel_that_is_not_installed_is_suggested(world):
    world.rows()
    assert refusal("flash") == "backend 'flash' comes with attn-flash, which is not installed: pip install attn-flash"
    assert registry.knows("flash")
    assert "pip install attn-flash" in refusal("Attn_Flash:flash")
    assert registry.knows("attn-flash:flash")
    assert not registry.knows("attn-xformers:flash")
    assert {row.status for row in registry.known_rows()} == {"not installed"}
    assert {row.distribution for row in registry.known_rows() if row.name == "native"} == {"attn-native"}


def test_a_known_wheel_that_is_installed_and_broken_is_to_blame(world):
    world.wheel("attn-flash", "raise OSError('libcudart.so.12')")
    world.rows()
    message = refusal("flash_3")
    assert "attn-flash 1.0, which is broken" in message
    assert "libcudart.so.12" in message


def test_a_known_wheel_that_is_too_old_is_to_be_upgraded(world):
    world.wheel("attn-flash", declaring("'flash'"))
    world.rows()
    assert "pip install --upgrade attn-flash" in refusal("flash_4")
    assert all(row.distribution != "attn-flash" for row in registry.known_rows() if row.status == "not installed")


def test_with_no_wheel_at_all_the_pip_line_is_given(world):
    world.rows()
    assert "pip install attn-native" in refusal("native")
    message = refusal("zzzzzz")
    assert "no backend wheel is installed" in message
    assert "pip install attn-native" in message


def test_a_backend_that_is_not_available_says_why_and_what_next(world):
    world.wheel(
        "acme-attn",
        declaring("'acme', needs='kernel', aliases={'old'}"),
        requires=["fast>=2; extra == 'kernel'"],
        extras=["kernel"],
    )
    world.rows()
    for name in ("acme", "old"):
        message = refusal(name)
        assert "acme" in message
        assert "is missing: needs fast>=2. Next: pip install 'acme-attn[kernel]'" in message


def test_the_wheels_are_asked_once_also_by_many_threads(world, monkeypatch):
    monkeypatch.setattr(sys, "asked", [], raising=False)
    body = "import sys, time\nsys.asked.append(1)\ntime.sleep(0.05)\n"
    world.wheel("acme-attn", body + declaring("'acme'"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: registry.rows(), range(8)))
    assert len(sys.asked) == 1
    assert all(rows is found[0] for rows in found)


def test_refresh_sees_what_has_come_and_gone(world):
    assert world.rows() == ()
    info = world.wheel("acme-attn", declaring("'acme'"))
    assert registry.rows() == ()
    registry.refresh()
    assert [row.name for row in list_backends()] == ["acme"]
    (info / "entry_points.txt").unlink()
    registry.refresh()
    assert list_backends() == []


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("acme,other", r"are written \('acme', 'other'\)"),
        ("acme:", "distribution:name"),
        (":acme", "distribution:name"),
    ],
)
def test_names_that_are_written_otherwise(world, asked, says):
    world.wheel("acme-attn", declaring("'acme'"))
    world.rows()
    assert re.search(says, refusal(asked))
