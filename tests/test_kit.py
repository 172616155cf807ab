"""The kit itself: what it draws, what its outcomes mean, and how they are told by ``attn check`` and under pytest."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from itertools import combinations, product
from random import Random

import pytest
import torch
from fake_distributions import HEAD, world  # noqa: F401 (a fixture)

from attn_core import registry
from attn_core.cli import main
from attn_core.commands.check import exit_status, report
from attn_core.reading import read
from attn_core.testing import (
    Case,
    NotChecked,
    check_backend,
    checking,
    checks_of,
    compare,
    draw,
    kit,
    recheck,
    subject,
)
from attn_core.testing.covering import cover
from attn_core.testing.facing import facts_of
from attn_core.testing.head_dims import many_head_dims, representative_head_dims
from attn_core.testing.kinds import kind_of
from attn_core.testing.kit import Outcome, run_check
from attn_core.testing.shrinking import shrink

DECLARATION = """
LIMITS = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, causal=True, cross_lengths=True, lse=True)
ONLY_CAUSAL = Rule("only causal calls", lambda facts: not facts.causal)

def backend(name, forward="right", constraints=LIMITS, **changes):
    return spec(name, forward=f"kit_kernels:{forward}", constraints=constraints, **changes)

@hookimpl
def attn_backends():
    yield backend("right")
    yield backend("liar", "causal_forgotten")
    yield backend("nan_hidden", "nan_hidden")
    yield backend("deadly", "ends_the_process")
    yield backend("for_cuda", constraints=Constraints(platforms={"cuda"}, dtypes={"float32"}, masks={"none"}))
    yield backend("lacking", needs="a_module_that_nobody_has")
    yield spec("unloadable", forward="kit_kernels:no_such_function")
    for name in ("off_by_1_percent", "off_by_5_percent_of_17_keys", "lse_off"):
        yield backend(name, name, numerics=Approximate(0.02))
    for name, scores in (("off_as_its_scores", 1.0), ("off_as_its_scores_unsaid", None)):
        yield backend(name, "off_as_its_scores", numerics=Approximate(0.02, scores=scores))
    masks = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"packed"})
    yield backend("packed_only", constraints=masks)
    dims = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, head_dims={(192, 128)})
    yield backend("one_pair", constraints=dims)
    ruled = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, causal=True, rules=(ONLY_CAUSAL,))
    yield backend("causal_only", constraints=ruled)
    nothing = Rule("nothing at all", lambda facts: True)
    yield backend("nobodys", constraints=Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, rules=(nothing,)))
"""
KERNELS = """
import os
from attn_core.testing import reference

def right(query, key, value, *, scale, attn_mask=None, causal=False, return_lse=False):
    out, lse = reference(query, key, value, scale=scale, attn_mask=attn_mask, causal=causal)
    out, lse = out.to(query.dtype), lse.float()
    return (out, lse) if return_lse else out

def causal_forgotten(query, key, value, *, causal=False, **options):
    return right(query, key, value, **options)

def nan_hidden(query, key, value, **options):
    return right(query.nan_to_num(), key.nan_to_num(), value.nan_to_num(), **options)

def ends_the_process(*arguments, **options):
    os._exit(9)

def times(number, query, key, value, return_lse, **options):
    out, lse = right(query, key, value, return_lse=True, **options)
    return (out * number, lse) if return_lse else out * number

def off_by_1_percent(query, key, value, *, return_lse=False, **options):
    return times(1.01, query, key, value, return_lse, **options)

def off_by_5_percent_of_17_keys(query, key, value, *, return_lse=False, **options):
    return times(1.05 if key.shape[1] == 17 else 1.0, query, key, value, return_lse, **options)

def off_as_its_scores(query, key, value, *, scale, return_lse=False, **options):
    size = scale * query.norm(dim=-1).max() * key.norm(dim=-1).max() / query.shape[3] ** 0.5
    return times(1 + 0.015 * max(1.0, float(size.abs())), query, key, value, return_lse, scale=scale, **options)

def lse_off(query, key, value, *, return_lse=False, **options):
    out, lse = right(query, key, value, return_lse=True, **options)
    return (out, lse + 0.05) if return_lse else out
"""


@pytest.fixture(autouse=True)
def wheels(world):  # noqa: F811
    """Backends for which the kit has something to say, and a wheel whose declaration raises."""
    (world.folder / "first" / "kit_kernels.py").write_text(KERNELS)
    world.wheel("attn-kit", HEAD + DECLARATION)
    world.wheel("sick", "raise RuntimeError('not today')")
    registry.refresh()
    return world


def only(*identifiers):
    return lambda identifier: identifier in identifiers


def one(name, identifier, **settings):
    (found,) = (item for item in check_backend(name, only=only(identifier), **settings) if item.check == identifier)
    return found


# --- what an outcome means ------------------------------------------------------------------------------------------------


def test_a_failure_that_is_excused_is_told_with_its_reason():
    outcome = one("liar", "causal", excuses={"causal": "repaired in the next release"})
    assert outcome.status == kit.EXCUSED
    assert outcome.detail.startswith("repaired in the next release (")
    assert exit_status([outcome]) == 0


def test_an_excuse_that_is_no_longer_needed_fails():
    outcome = one("right", "causal", excuses={"causal": "slow"})
    assert outcome.status == kit.FAILED
    assert "no longer needed" in outcome.detail


def test_an_excuse_for_no_check_fails():
    found = list(check_backend("right", excuses={"casual": "mistyped"}, only=only("causal")))
    assert [(item.check, item.status) for item in found] == [("casual", kit.FAILED), ("causal", kit.PASSED)]


@pytest.mark.parametrize("reason", ["", " "])
def test_an_excuse_without_a_reason_fails(reason):
    first, _ = check_backend("liar", excuses={"causal": reason}, only=only("causal"))
    assert (first.check, first.status, first.detail) == ("causal", kit.FAILED, "an excuse without a reason")


def test_a_new_check_warns_where_it_would_fail():
    (causal,) = (check for check in checks_of(registry.find("liar").spec) if check.identifier == "causal")
    new = replace(causal, definition=replace(causal.definition, new=True))
    assert run_check(causal, subject("liar", quick=True)).status == kit.FAILED
    outcome = run_check(new, subject("liar", quick=True))
    assert outcome.status == kit.WARNED
    assert exit_status([outcome]) == 0
    assert run_check(new, subject("right", quick=True)).status == kit.PASSED


@pytest.mark.parametrize(
    ("name", "why"),
    [("lacking", "a_module_that_nobody_has"), ("for_cuda", "cuda"), ("nobodys", None)],
)
def test_a_backend_that_cannot_be_checked_here_is_not_checked_and_says_why(name, why):
    if name == "nobodys":
        assert one("nobodys", "results").detail.endswith("the plainest is refused: nothing at all")
        return
    if name == "for_cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (outcome,) = check_backend(name)
    assert (outcome.check, outcome.status) == ("", kit.NOT_CHECKED)
    assert why in outcome.detail
    assert exit_status([outcome]) == 3


@pytest.mark.parametrize("fields", [{}, {"gradients": ("query",)}, {"deterministic": True}])
def test_nan_is_told_as_a_wrong_number_and_not_as_a_change(fields):
    def call(query, key, value, **options):
        return query * torch.nan

    with pytest.raises(AssertionError, match="found nan, expected"):
        compare(Case(**fields), call)


def test_what_a_check_raises_is_a_failure_that_names_it():
    outcome = one("unloadable", "loads")
    assert outcome.status == kit.FAILED
    assert "no_such_function" in outcome.detail
    assert {item.status for item in check_backend("unloadable", only=only("causal", "results"))} == {kit.NOT_CHECKED}


# --- the command ----------------------------------------------------------------------------------------------------------


def attn_check(capsys, *arguments):
    status = main(["check", *arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_a_pass_exits_0_with_a_table(capsys):
    status, out, _ = attn_check(capsys, "right", "--only", "causal,results")
    assert status == 0
    assert [line.split() for line in out.splitlines() if line] == [
        ["Check", "right"], ["results", "passed"], ["causal", "passed"], ["right:", "2", "passed"],
    ]  # fmt: skip


def test_a_failure_exits_1_with_a_snippet_that_shows_it(capsys):
    status, out, _ = attn_check(capsys, "liar", "--only", "causal")
    assert status == 1
    assert "FAILED" in out
    code = "\n".join(line[4:] for line in out.splitlines() if line.startswith("    "))
    assert code.startswith("from functools import partial")
    with pytest.raises(AssertionError, match="result"):
        exec(code, {})
    exec(code.replace("attn-kit:liar", "right"), {})  # the same call of an honest backend


def test_a_declaration_that_raises_fails_and_exits_1(capsys):
    status, out, _ = attn_check(capsys, "sick")
    assert status == 1
    assert "failed: sick, declaration: " in out
    assert "RuntimeError: not today" in out


@pytest.mark.parametrize("name", ["lacking", "for_cuda"])
def test_a_backend_that_cannot_be_checked_exits_3_and_says_why(capsys, name):
    if name == "for_cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    status, out, _ = attn_check(capsys, name)
    assert status == 3
    assert f"{name}: not checked: " in out


def test_a_failure_outweighs_what_was_not_checked(capsys):
    assert attn_check(capsys, "lacking", "liar", "--only", "causal")[0] == 1


def test_an_unknown_name_exits_2(capsys):
    status, out, err = attn_check(capsys, "lier")
    assert (status, out) == (2, "")
    assert "Did you mean 'liar'" in err


def test_a_check_that_nobody_has_exits_2_and_names_the_closest(capsys):
    status, out, err = attn_check(capsys, "right", "--only", "results,casual")
    assert (status, out) == (2, "")
    assert "no check is called 'casual'" in err
    assert "Did you mean 'causal'" in err
    assert "results" in attn_check(capsys, "right", "--only", "zzz")[2]  # the list


@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_here_is_an_error(capsys, device):
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("this machine has CUDA")
    status, out, err = attn_check(capsys, "for_cuda", "--device", device)
    assert (status, out) == (2, "")
    assert device in err
    assert "cpu" in err


def test_only_takes_a_check_with_and_without_its_brackets(capsys):
    _, out, _ = attn_check(capsys, "right", "--only", "refused", "--json")
    several = [item["check"] for item in json.loads(out)]
    assert "refused[softcap]" in several
    assert len(several) > 3
    _, out, _ = attn_check(capsys, "right", "--only", "refused[softcap]", "--json")
    assert [item["check"] for item in json.loads(out)] == ["refused[softcap]"]


def test_the_size_of_the_covering_set_and_the_share_that_rules_refuse_stand_below_the_table(capsys):
    _, out, _ = attn_check(capsys, "causal_only", "--quick", "--only", "combinations,declared-values")
    *_, counts, covering, refused = out.splitlines()
    assert counts == "causal_only: 2 passed"
    assert covering.startswith("causal_only, combinations: ")
    assert "calls that cover" in covering
    assert refused.startswith("causal_only, declared-values: ")
    assert refused.endswith("% of what the data admits")


def test_that_numpy_is_not_there_is_nothing_to_warn_of(capsys):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attn_check(capsys, "right", "--only", "loads")
        warnings.warn("Failed to initialize NumPy: No module named 'numpy'", stacklevel=1)  # as torch does
    assert [str(item.message) for item in told if "NumPy" in str(item.message)] == []


def test_only_may_be_given_twice_and_a_backend_named_twice_is_checked_once(capsys):
    status, out, _ = attn_check(capsys, "right", "right", "--only", "causal", "--only", "scale")
    assert status == 0
    assert "right: 2 passed" in out


def test_nothing_checked_is_no_success(capsys):
    status, out, _ = attn_check(capsys, "right", "--only", "softcap")
    assert status == 3
    assert "nothing was checked" in out


def test_a_record_that_cannot_be_written_is_refused_before_the_run(capsys, tmp_path):
    status, out, err = attn_check(capsys, "right", "--record", str(tmp_path / "nowhere" / "record.json"))
    assert (status, out) == (2, "")
    assert "--record" in err


def test_a_process_that_ends_is_a_failure_of_its_backend_alone(capsys):
    status, out, _ = attn_check(capsys, "right", "deadly", "--only", "loads,results,scale")
    assert status == 1
    assert "right: 3 passed" in out
    assert "deadly, process: its process ended (exit status 9) in the check after loads" in out


def test_json_is_the_outcomes_and_no_table(capsys):
    status, out, _ = attn_check(capsys, "liar", "--only", "causal,results", "--json")
    assert status == 1
    results, causal = json.loads(out)
    assert (results["status"], causal["status"]) == ("passed", "failed")
    assert "compare(Case(" in causal["snippet"]


def test_a_record_has_kit_date_machine_versions_and_outcomes(capsys, tmp_path):
    file = tmp_path / "record.json"
    attn_check(capsys, "liar", "lacking", "--only", "causal,results", "--record", str(file), "--seed", "5", "--quick")
    record = json.loads(file.read_text())
    assert (record["kit"], record["seed"], record["quick"]) == (checking.KIT, 5, True)
    assert record["only"] == ["causal", "results"]  # so that nobody takes it for the whole
    assert len(record["date"].split("-")) == 3
    assert record["machine"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["backends"]["liar"]["version"] == "1.0"
    told = {item["check"]: item["status"] for item in record["backends"]["liar"]["outcomes"]}
    assert told == {"results": "passed", "causal": "failed"}
    assert record["backends"]["lacking"]["outcomes"][0]["status"] == "not checked"


def test_the_table_has_a_column_for_each_backend_and_says_what_is_wrong():
    def outcome(backend, check, status, **more):
        return Outcome(backend=backend, check=check, status=status, **more)

    long = "rule[a text that is longer than the column of checks]"
    text = report([
        outcome("one", "causal", kit.PASSED), outcome("one", long, kit.FAILED, detail="off", snippet="a\nb"),
        outcome("another_one", "causal", kit.NOT_CHECKED, detail="why"),
        outcome("another_one", "lse", kit.EXCUSED, detail="known"),
        outcome("third", "", kit.NOT_CHECKED, detail="no such library"),
    ])  # fmt: skip
    assert text.splitlines() == [
        f"{'Check':30}  one      another_one",
        f"{'causal':30}  passed   -",
        f"{'rule[a text that is longer ...':30}  FAILED",
        f"{'lse':30}           excused",
        "",
        "",
        f"failed: one, {long}: off",
        "    a",
        "    b",
        "",
        "excused: another_one, lse: known",
        "another_one: not checked (causal): why",
        "third: not checked: no such library",
        "one: 1 passed, 1 failed",
        "another_one: 1 excused, 1 not checked",
    ]


# --- under pytest ---------------------------------------------------------------------------------------------------------

TESTS = """
from attn_core.testing import checking, parametrize_with_checks
from dataclasses import replace

def wanted(*words):
    def keep(function):
        (mark,) = function.pytestmark
        mark.args[1][:] = [item for item in mark.args[1] if item.identifier.endswith(words)]
        mark.kwargs["ids"][:] = [item.identifier for item in mark.args[1]]
        return function
    return keep

@wanted("-causal", "-results")
@parametrize_with_checks("right", "liar", "lacking", "for_cuda", quick=True)
def test_plain(check):
    check()

@wanted("-causal", "-excuses")
@parametrize_with_checks("liar", excuses={"causal": "known", "casual": "mistyped"}, quick=True)
def test_excused(check):
    check()

@wanted("-causal")
@parametrize_with_checks("right", excuses={"causal": "stale"}, quick=True)
def test_stale(check):
    check()

@parametrize_with_checks("sick")
def test_sick(check):
    check()

def test_new():
    import pytest
    from attn_core.testing import KitWarning
    @parametrize_with_checks("liar", quick=True)
    def nothing(check):
        pass

    (mark,) = nothing.pytestmark
    (bound,) = [item for item in mark.args[1] if item.identifier == "liar-causal"]
    bound.check = replace(bound.check, definition=replace(bound.check.definition, new=True))
    with pytest.warns(KitWarning, match="liar-causal"):
        bound()
"""


def test_under_pytest_each_outcome_is_what_pytest_calls_so(wheels):
    file = wheels.folder / "test_strangers.py"
    file.write_text(TESTS)
    ended = wheels.python(
        "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--rootdir", str(wheels.folder), str(file), check=False
    )
    lines = [
        line for line in ended.stdout.splitlines() if line.split(" ")[0] in ("PASSED", "FAILED", "SKIPPED", "XFAIL")
    ]
    told = {line.split("::")[1].split(" ")[0]: line.split(" ")[0] for line in lines if "::" in line}
    assert told == {
        "test_plain[right-results]": "PASSED", "test_plain[right-causal]": "PASSED",
        "test_plain[liar-results]": "PASSED", "test_plain[liar-causal]": "FAILED",
        "test_excused[liar-causal]": "XFAIL", "test_excused[liar-excuses]": "FAILED",
        "test_stale[right-causal]": "FAILED", "test_sick[sick-declaration]": "FAILED", "test_new": "PASSED",
    }, ended.stdout  # fmt: skip
    skipped = " ".join(line for line in lines if line.startswith("SKIPPED"))
    assert "not checked: lacking is missing" in skipped
    assert "a_module_that_nobody_has" in skipped
    if not torch.cuda.is_available():
        assert "for_cuda is not for this machine" in skipped
    assert "compare(Case(" in ended.stdout


# --- what is drawn --------------------------------------------------------------------------------------------------------


def test_the_seed_decides_what_is_drawn():
    def drawn(seed):
        return subject("right", seed=seed).draw(20, "lengths", "scale", "layouts")

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    first, again, other = (subject("right", seed=seed, quick=True).combinations for seed in (2, 2, 3))
    assert first == again
    assert first != other


def test_the_command_hands_the_seed_on(capsys):
    def told(seed):
        return attn_check(capsys, "right", "--only", "declared-values", "--json", "--seed", seed)[1].partition(
            '"seconds"'
        )[0]

    first = told("3")
    assert told("3") == first
    assert any(told(seed) != first for seed in "012")


def test_the_covering_set_says_how_many_calls_it_has():
    tested = subject("right", quick=True)
    outcome = one("right", "combinations[float32]", quick=True)
    assert f"of {len(tested.combinations.cases)} calls that cover" in outcome.detail
    assert "single values" in outcome.detail
    assert "pairs of values" in str(subject("right").combinations)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("strength", [1, 2])
def test_a_covering_set_has_every_pair_that_is_admitted(seed, strength):
    random = Random(seed)
    sizes = [random.randint(1, 4) for _ in range(5)]
    forbidden = [
        {factor: random.randrange(sizes[factor]) for factor in random.sample(range(5), random.choice((2, 2, 3)))}
        for _ in range(random.randint(0, 12))
    ]
    forbidden = [rule for rule in forbidden if any(rule.values())]  # the plainest row is admitted

    def admitted(row):
        return not any(all(row[factor] == value for factor, value in rule.items()) for rule in forbidden)

    rows = [row for row in product(*map(range, sizes)) if admitted(row)]

    def contained(chosen):
        return {pair for row in chosen for pair in combinations(enumerate(row), strength)}

    found = cover(sizes, admitted, Random(seed), strength=strength)
    assert all(map(admitted, found.rows))
    assert contained(found.rows) == contained(rows)
    assert found.covered == len(contained(rows))
    assert not set(found.refused) & contained(rows)
    assert found == cover(sizes, admitted, Random(seed), strength=strength)


def test_a_covering_set_finds_what_one_row_alone_admits():
    needle = (1, 2, 1, 3, 2, 1)
    found = cover([2, 3, 2, 4, 3, 2], lambda row: row in (needle, (0,) * 6), Random(0))
    assert set(found.rows) == {needle, (0,) * 6}


def test_facts_of_a_drawn_call_are_those_that_are_read():
    random = Random(7)
    for turn in range(400):
        case = draw(random.choice, {"spoiled": [None]})
        if case.dtype == "float64" and case.mask_dtype != "same":
            case = replace(
                case, autocast=None
            )  # it would cast the mask alone, to a dtype that is refused beside float64
        case = replace(case, queries=min(case.queries, 40), keys=None if case.keys is None else min(case.keys, 40))
        built = case.build()
        options = {
            "attn_mask": None, "causal": False, "window_size": None, "scale": None, "softcap": None, "dropout_p": 0.0,
            "deterministic": False, "return_lse": False, **built.options,
        }  # fmt: skip
        with torch.inference_mode() if case.mode == "inference" else torch.set_grad_enabled(case.mode == "grad"):
            if case.autocast is None:
                found = read(built.query, built.key, built.value, options).facts
            else:
                with torch.autocast("cpu", getattr(torch, case.autocast)):
                    found = read(built.query, built.key, built.value, options).facts
        assert facts_of(case) == found, (turn, case)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (None, [(dim, dim) for dim in (64, 16, 128, 80, 32, 8, 1, 3, 40, 96, 192, 256)]),
        ({32, 48}, [(32, 32), (48, 48)]),
        (range(24, 73, 8), [(64, 64), (32, 32), (40, 40), (24, 24), (72, 72)]),
        ({(192, 128), (576, 512)}, [(192, 128), (576, 512)]),
        ({64, (192, 128)}, [(64, 64), (192, 128)]),
    ],
)
def test_representative_head_dims_have_the_usual_ones_the_ends_and_every_pair(declared, expected):
    from attn_core.plugin import Constraints

    constraints = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, head_dims=declared)
    found = representative_head_dims(constraints.head_dims)
    assert sorted(found) == sorted(expected)
    assert found[0] == expected[0]


def test_many_head_dims_are_all_of_a_set_or_of_a_short_range_and_of_a_long_one_those_of_every_divisor():
    drawn = Random(3)
    assert many_head_dims({72, 24, (192, 128), 56}, drawn) == [(24, 24), (56, 56), (72, 72), (192, 128)]
    assert many_head_dims(range(8, 257, 8), drawn) == [(dim, dim) for dim in range(8, 257, 8)]
    for declared in (range(16, 257), None):
        found = {dim for dim, _ in many_head_dims(declared, drawn)}
        assert {24, 32, 48, 56, 72, 112, 160, 224, 256} <= found
        assert all(any(dim % step == 0 and dim % (2 * step) for dim in found) for step in (1, 2, 4, 8, 16, 32, 64))
        assert declared is None or {16, 256} <= found <= set(declared)


def test_autocast_never_meets_a_float_mask_of_another_dtype_than_a_query_of_float64():
    """It would cast the mask and leave the query."""
    case = subject("right").case(dtype="float64", mask="float", mask_dtype="float32", autocast="float16")
    assert case.mask_dtype == "same"


def test_what_is_met_already_is_not_covered_again_and_completions_are_looked_for_around_each_base():
    met = [((0, 1),), ((1, 1),)]
    assert not cover([2, 2], lambda row: row == (0, 0), Random(0), strength=1, met=[*met, ((0, 0),), ((1, 0),)]).rows
    far = (1,) * 12
    near = {far, *(tuple(2 if place == n else 1 for place in range(12)) for n in range(12))}
    sizes, admitted = [3] * 12, {(0,) * 12, *near}.__contains__
    assert cover(sizes, admitted, Random(0), strength=1).refused
    assert not cover(sizes, admitted, Random(0), strength=1, plainest=[(0,) * 12, far]).refused


def test_where_each_kind_compiles_checks_share_few_kinds_and_try_each_in_many_ways(wheels):
    head, _, _ = DECLARATION.partition("    yield")
    wheels.wheel("attn-kit-slow", f"{HEAD}{head}    yield backend('slow', first_call_compiles=True)")
    registry.refresh()
    tested = subject("slow")
    kinds = {kind_of(case) for case in tested.combinations.cases}
    assert len(kinds) <= 40
    scales = tested.draw(5, each=[{"scale": scale} for scale in (0.3, 2, 0, -0.5)])
    assert {case.scale for case in scales} == {0.3, 2, 0, -0.5}
    assert {kind_of(case) for case in scales} <= kinds
    each = [{"causal": True, "queries": queries, "keys": keys} for queries, keys in ((5, 17), (33, 5), (6, 18))]
    causal = tested.draw(3, "return_lse", "gradients", each=each)
    assert {kind_of(case) for case in causal} <= kinds
    assert {(case.queries, case.keys) for case in causal} == {(5, 17), (33, 5)}


# --- the smallest call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fails", "smallest"),
    [
        (lambda case: case.causal and case.queries > 8, Case(causal=True, queries=9)),
        (lambda case: case.keys is not None and case.keys % 2 == 1, Case(keys=1)),
        (lambda case: case.heads != (1, 1), Case(heads=(6, 2))),
        (lambda case: case.batch * case.queries > 20, None),
        (lambda case: True, Case(device="cpu")),
    ],
)
def test_shrinking_ends_at_a_call_of_which_no_plainer_one_fails(fails, smallest):
    from attn_core.testing.shrinking import _smaller

    start = Case(batch=3, queries=40, keys=17, heads=(6, 2), dim=64, value_dim=16, causal=True, scale=2.0, seed=9)
    found = shrink(start, fails)
    assert fails(found)
    assert not any(map(fails, _smaller(found)))
    if smallest is not None:
        assert found == smallest


def test_shrinking_keeps_a_call_that_nothing_makes_smaller():
    start = Case(queries=40, causal=True)
    assert shrink(start, start.__eq__) == start


# --- approximate backends, and narrow ones --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "check", "status"),
    [
        ("off_by_1_percent", "cross_lengths", kit.PASSED),
        ("off_by_1_percent", "lse", kit.PASSED),
        ("off_by_5_percent_of_17_keys", "cross_lengths", kit.FAILED),
        ("lse_off", "lse", kit.FAILED),
        ("off_as_its_scores", "scale", kit.PASSED),
        ("off_as_its_scores", "magnitudes", kit.PASSED),
        ("off_as_its_scores_unsaid", "scale", kit.FAILED),
    ],
)
def test_an_approximate_backend_is_held_to_its_error_at_every_shape(name, check, status):
    outcome = one(name, check)
    assert outcome.status == status, outcome.detail
    if status == kit.FAILED:
        assert "a relative error of 0.02" in outcome.detail


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("packed_only", {"mask": "packed", "batch": 1}),
        ("one_pair", {"dim": 192, "value_dim": 128}),
        ("causal_only", {"causal": True}),
    ],
)
def test_a_backend_that_does_not_admit_the_plainest_call_is_tried_with_the_plainest_that_it_admits(name, plain):
    tested = subject(name, quick=True)
    assert {field: getattr(tested.plain, field) for field in plain} == plain
    assert tested.admits(tested.plain)
    asked = ("results", "scale", "lengths", "senseless", "combinations[float32]")
    outcomes = list(check_backend(name, quick=True, only=asked.__contains__))
    assert len(outcomes) == 5
    assert {outcome.status for outcome in outcomes} == {kit.PASSED}, outcomes


# --- what shows a failure -------------------------------------------------------------------------------------------------


def test_a_check_that_changes_tensors_is_shown_by_the_smallest_call_that_it_starts_from():
    outcome = one("nan_hidden", "nan-and-inf")
    assert outcome.status == kit.FAILED
    *_, line = outcome.snippet.splitlines()
    assert line == "recheck('nan-and-inf', Case(), 'attn-kit:nan_hidden')"
    with pytest.raises(AssertionError, match="nan in value row 2 gives finite results"):
        exec(outcome.snippet, {})
    exec(outcome.snippet.replace("attn-kit:nan_hidden", "right"), {})  # the same of an honest backend


def test_a_check_is_not_run_again_on_a_call_that_it_does_not_make():
    with pytest.raises(NotChecked, match="makes no such call"):
        recheck("nan-and-inf", Case(dtype="float64"), "right")
    with pytest.raises(NotChecked, match="declares nothing"):
        recheck("softcap", Case(), "right")
