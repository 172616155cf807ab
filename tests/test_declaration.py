"""What a record that contradicts itself is told when it is made."""

from __future__ import annotations

from random import Random

import pytest

from attn_core.admission import refusals
from attn_core.listing import as_data
from attn_core.plugin import BackendSpec, Backward, CapabilityRange, Constraints, DeclarationError, Facts, Needs, No
from attn_core.record import AVAILABLE, Row
from attn_core.testing.head_dims import many_head_dims, representative_head_dims

NARROW = {"platforms": {"cuda"}, "dtypes": {"float16", "bfloat16"}, "masks": {"none", "bool"}}


def constraints(backward, **forward):
    return Constraints(**{**NARROW, "backward": Backward(**backward), **forward})


@pytest.mark.parametrize(
    ("backward", "forward", "message"),
    [
        ({"dtypes": {"float16", "float32"}}, {}, "dtypes: found float32; accepted: bfloat16, float16"),
        ({"platforms": {"cuda", "cpu"}}, {}, "platforms: found cpu; accepted: cuda"),
        ({"masks": {"none", "packed"}}, {}, "masks: found packed; accepted: bool, none"),
        ({"masks": {"bool": True}}, {"masks": {"none": True, "bool": No("none")}}, "masks: found bool; accepted: none"),
        ({"softcap": True}, {"softcap": No("no tanh")}, r"softcap: found True; accepted: a No, .*\(no tanh\)"),
        ({"dropout": True}, {}, r"dropout: found True; accepted: a No, .*\(not declared\)"),
        ({"head_dims": {64, 96}}, {"head_dims": {64, 128}}, "head_dim: found 96; accepted: 64, 128"),
        (
            {"head_dims": {(64, 32)}},
            {"head_dims": {64}},
            r"head_dim: found \(64, 32\) for query and value; accepted: 64",
        ),
        ({"head_dims": range(8, 265, 8)}, {"head_dims": range(8, 257, 8)}, "head_dim: found 264; accepted: 8 to 256"),
        (
            {"compute_capability": {(9, 0), (10, 0)}},
            {"compute_capability": {(9, 0)}},
            "compute_capability: found 9.0, 10.0; accepted: 9.0",
        ),
        (
            {"compute_capability": CapabilityRange((7, 5))},
            {"compute_capability": CapabilityRange((8, 0))},
            "compute_capability: found 7.5 and up; accepted: 8.0 and up",
        ),
        (
            {"compute_capability": CapabilityRange((8, 0))},
            {"compute_capability": CapabilityRange((8, 0), (9, 0))},
            "compute_capability: found 8.0 and up; accepted: 8.0 to 9.0",
        ),
        (
            {"compute_capability": CapabilityRange((9, 0))},
            {"compute_capability": {(9, 0)}},
            "compute_capability: found 9.0 and up; accepted: 9.0",
        ),
    ],
)
def test_a_backward_wider_than_its_forward_is_refused_with_found_and_accepted(backward, forward, message):
    with pytest.raises(DeclarationError, match=f"Constraints: backward admits what the forward does not: {message}"):
        constraints(backward, **forward)


def test_every_way_in_which_a_backward_is_wider_is_told():
    with pytest.raises(DeclarationError, match="dtypes: found float64.*; softcap: .*; dropout: "):
        constraints({"dtypes": {"float64"}, "softcap": True, "dropout": True})


@pytest.mark.parametrize(
    ("backward", "forward"),
    [
        ({}, {}),
        ({"dtypes": {"float16"}, "platforms": {"cuda"}, "masks": {"none"}}, {}),
        ({"softcap": True, "dropout": No("no state")}, {"softcap": True, "dropout": True}),
        ({"softcap": No("no derivative")}, {}),
        ({"head_dims": range(8, 129)}, {}),
        ({"head_dims": range(8, 129, 8)}, {"head_dims": range(8, 257, 8)}),
        ({"head_dims": {(64, 32), 64}}, {"head_dims": {32, 64}}),
        ({"head_dims": {(192, 128)}}, {"head_dims": {(192, 128)}}),
        ({"compute_capability": {(9, 0)}}, {}),
        ({"compute_capability": CapabilityRange((9, 0))}, {"compute_capability": CapabilityRange((8, 0))}),
        ({"compute_capability": CapabilityRange((8, 0), (9, 0))}, {"compute_capability": {(8, 0), (8, 6), (9, 0)}}),
    ],
)
def test_a_backward_as_narrow_as_its_forward_or_narrower_is_a_record(backward, forward):
    assert constraints(backward, **forward).backward == Backward(**backward)


def test_the_library_of_a_backward_is_asked_for_where_a_gradient_may_be():
    spec = BackendSpec(
        api=1,
        name="acme",
        summary="Acme",
        forward="acme:forward",
        constraints=Constraints(
            platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, backward=Backward(library="nosuchlibrary>=2")
        ),
    )
    assert refusals(spec, Facts()) == []
    assert refusals(spec, Facts(backward=True)) == ["needs nosuchlibrary>=2, which is not installed"]


NO_MASK = No("the kernel of this device takes no mask")
ON_GPU = {"platform": "cuda", "compute_capability": (9, 0), "dtype": "float16"}


def alternatives(*constraints):
    return BackendSpec(api=1, name="acme", summary="Acme", forward="acme:forward", constraints=constraints)


@pytest.mark.parametrize("order", [1, -1])
def test_a_refusal_is_in_the_words_of_the_alternative_for_the_device_of_the_call(order):
    here = Constraints(
        platforms={"cuda"}, dtypes={"float16"}, masks={"none": True, "bool": NO_MASK}, softcap=No("none here")
    )
    elsewhere = Constraints(platforms={"cpu"}, dtypes={"float16"}, masks={"none", "bool"}, softcap=True)
    spec = alternatives(*(here, elsewhere)[::order])
    facts = Facts(**ON_GPU, mask="bool", softcap=True)
    for found in (spec.reasons(facts), refusals(spec, facts)):
        assert found == here.reasons(facts)
        assert len(found) > len(elsewhere.reasons(facts)), "another device's alternative has fewer reasons"


def test_of_two_alternatives_for_one_device_that_with_fewer_reasons_speaks():
    wide = Constraints(platforms={"cuda"}, dtypes={"float16"}, masks={"none"}, head_dims={256})
    near = Constraints(platforms={"cuda"}, dtypes={"float16"}, masks={"none", "bool"}, head_dims={64})
    older = Constraints(
        platforms={"cuda"}, compute_capability={(8, 0)}, dtypes={"float16"}, masks={"none", "bool"}, head_dims={128}
    )
    facts = Facts(**ON_GPU, mask="bool", head_dim=128, value_head_dim=128)
    assert alternatives(wide, older, near).reasons(facts) == near.reasons(facts) != []


LONG = range(1, 10**12)


def test_a_range_of_head_dims_is_never_listed():
    made = constraints({"head_dims": LONG}, head_dims=LONG)
    (reason,) = made.reasons(Facts(platform="cuda", dtype="float16", head_dim=10**11, value_head_dim=3))
    assert reason.startswith("value_head_dim: found 3 beside a query and key head dim of 100000000000; not supported")
    assert made.reasons(Facts(platform="cuda", dtype="float16", head_dim=10**13, value_head_dim=10**13)) == [
        f"head_dim: found {10**13}; accepted: 1 to {10**12 - 1}"
    ]
    with pytest.raises(DeclarationError, match="head_dim: found 1; accepted: 64, 128"):
        constraints({"head_dims": LONG}, head_dims={64, 128})
    with pytest.raises(DeclarationError, match="head_dim: found 2; accepted: 1 to 999999999999 in steps of 2"):
        constraints({"head_dims": LONG}, head_dims=LONG[::2])
    for refused in (range(10**12), range(10**12, -1, -1), range(0)):
        with pytest.raises(DeclarationError, match="head_dims is a range, or a set of numbers"):
            constraints({}, head_dims=refused)
    shown = as_data(Row("acme", AVAILABLE, spec=alternatives(made)))["spec"]["constraints"][0]["head_dims"]
    assert shown == {"minimum": 1, "maximum": 10**12 - 1, "step": 1}
    assert representative_head_dims(LONG)[:2] == [(64, 64), (16, 16)]
    assert len(many_head_dims(LONG, Random(0))) > len(many_head_dims(range(1, 40), Random(0)))


def needing(needs):
    return BackendSpec(
        api=1, name="acme", summary="Acme", forward="acme:forward", needs=needs,
        constraints=Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}),
    )  # fmt: skip


@pytest.mark.parametrize("needs", ["", " ", "torch>=2", ".x", "x.", "a b", "acme[kernel]"])
def test_what_names_neither_an_extra_nor_a_module_is_refused(needs):
    with pytest.raises(DeclarationError, match=r"needs is the name of an extra or of a module, found '.*library="):
        needing(needs)
    with pytest.raises(DeclarationError, match="Needs: extra is the name of an extra of the wheel, found"):
        Needs(extra=needs)
    with pytest.raises(DeclarationError, match="Needs: module is the dotted name of a module, found"):
        Needs(module=needs)
    with pytest.raises(DeclarationError, match="Needs: install is a line of text, or None, found"):
        Needs(module="acme", install=" ")


@pytest.mark.parametrize(
    "needs", [None, "kernel", "flash-attn", "cuda12.4", "acme.kernels", "_acme", Needs(extra="x-y")]
)
def test_the_name_of_an_extra_or_of_a_module_is_taken(needs):
    assert needing(needs).needs == needs


def test_a_declaration_goes_into_sets_and_dicts():
    first, second = needing("kernel"), needing("kernel")
    assert first == second
    assert len({first, second, needing(None)}) == 2
