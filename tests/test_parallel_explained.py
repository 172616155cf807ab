"""What is said of a call across ranks that are not here, and of what backends can do there."""

from __future__ import annotations

import json

import pytest

from attn_core import cli
from attn_core.explanation import explain_shapes

SHAPES = ("1,4096,24,128", "1,4096,8,128")


def explained(capsys, *arguments):
    assert cli.main(["explain", "--query", SHAPES[0], "--key", SHAPES[1], "--dtype", "bfloat16", *arguments]) == 0
    return capsys.readouterr().out


def data(capsys, *arguments):
    return json.loads(explained(capsys, "--json", *arguments))


def verdict(found, name):
    return next(one for one in found["verdicts"] if one["name"] == name)


def test_a_ring_is_explained_with_what_it_sends(capsys):
    found = data(capsys, "--ring", "4", "--causal", "--backend", "native_flash")
    chunk = 1024 * 8 * (128 + 128) * 2
    assert found["chosen"] == "native_flash"
    assert found["parallel"] == {
        "mode": "ring", "ring": 4, "ulysses": 1, "order": "zigzag", "positions": 1024, "busiest_share": 1.0,
        "bytes_forward": 3 * chunk, "bytes_backward": 3 * chunk + 4 * 2 * chunk, "fastest": [1, 4],
    }  # fmt: skip


def test_contiguous_order_under_causal_is_said_to_be_unbalanced(capsys):
    share = data(capsys, "--ring", "4", "--causal", "--order", "contiguous")["parallel"]["busiest_share"]
    assert share == pytest.approx((1024 * 1025 / 2 + 3 * 1024**2) * 4 / (4096 * 4097 / 2))


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [(("--ring", "2"), "ring"), (("--ulysses", "2"), "ulysses"), (("--ring", "2", "--ulysses", "4"), "hybrid")],
)
def test_the_mode_follows_from_the_grid_and_each_backend_says_whether_it_has_it(capsys, arguments, mode):
    found = data(capsys, *arguments)
    assert found["parallel"]["mode"] == mode
    assert verdict(found, "native_math")["admitted"]
    refused = verdict(found, "flex")["reasons"]  # which has no log-sum-exp on a CPU
    assert (mode == "ulysses") == (refused == [])
    assert mode in explained(capsys, *arguments).splitlines()[1]


def test_a_backend_without_a_backward_of_its_own_is_refused_where_gradients_are_asked_for(capsys):
    reasons = verdict(data(capsys, "--ring", "2", "--backward", "--device", "cuda"), "flex")["reasons"]
    assert not any("context parallel" in reason for reason in reasons)
    assert verdict(data(capsys, "--ring", "2", "--backward", "--window-size=3,0"), "native_flash")["reasons"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ring", "0"), "ring: found 0; accepted"),
        (("--ulysses", "-2"), "ulysses: found -2; accepted"),
        (("--ring", "2", "--dropout-p", "0.1"), "dropout_p: not supported in context parallel"),
    ],
)
def test_what_makes_no_sense_across_ranks_is_refused_whoever_computes(capsys, arguments, said):
    assert said in data(capsys, *arguments)["refusal"]


@pytest.mark.parametrize(
    ("shape", "arguments", "fastest"),
    [
        ("1,65536,16,128", ("--ring", "8"), [1, 8]),  # a ring's steps are short, and launching them takes as long
        ("1,65536,2,128", ("--ring", "8"), [4, 2]),  # ulysses has a place for each head at most
        ("1,65536,1,128", ("--ulysses", "8"), [8, 1]),
    ],
)
def test_the_grid_predicted_to_be_the_fastest(capsys, shape, arguments, fastest):
    assert cli.main(["explain", "--query", shape, "--dtype", "bfloat16", "--causal", "--json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["parallel"]["fastest"] == fastest


def test_an_unknown_order_is_refused():
    shape = (1, 8, 2, 8)
    assert (
        "order: found 'snake'"
        in explain_shapes(shape, shape, shape, "float32", "cpu", (2, 1, "snake"), **NOTHING).refusal
    )


NOTHING = {
    "attn_mask": None, "causal": False, "scale": None, "window_size": None, "softcap": None, "dropout_p": 0.0,
    "deterministic": False, "return_lse": False, "parallel": None,
}  # fmt: skip


def test_heads_that_do_not_divide_make_a_rank_busier(capsys):
    assert data(capsys, "--ulysses", "16")["parallel"]["busiest_share"] == pytest.approx(2 / (24 / 16))


def test_the_listing_shows_what_has_no_backward_across_ranks(capsys):
    assert cli.main(["list-backends", "--json"]) == 0
    modes = {row["name"]: row["spec"]["context_parallel_modes"] for row in json.loads(capsys.readouterr().out)}
    assert modes["native_math"] == {"forward": ["ring", "ulysses", "hybrid"], "backward": ["ring", "ulysses", "hybrid"]}
    assert modes["native"] == modes["native_math"]
    assert modes["native_npu"] == {"forward": ["ulysses"], "backward": ["ulysses"]}
