"""The list as people and programs read it, and the command line around it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import fake_distributions
import pytest
from fake_distributions import declaring

from attn_core import cli, listing
from attn_core.declaration import BackendSpec, Constraints, DeclarationError

world = fake_distributions.world

FLASH = """'flash', needs=Needs(extra='kernel', install='pip install --no-build-isolation flash-attn (builds with nvcc)'),
    constraints=Constraints(platforms={'cuda'}, dtypes={'float16', 'bfloat16'}, masks={'none'}, lse=True, backward=True),
    backward='nowhere:backward', context_parallel=ContextParallelSupport(ring=True, ulysses=True)"""

TABLE = """\
Name   Status     Provided by       Context parallel  Reason
acme   broken     acme-attn 0.3.0   -                 its declaration raises ModuleNotFoundError: No module named 'acme_config': \
report it to the authors of acme-attn; ATTN_DISABLE=acme-attn leaves it out
flash  missing    attn-flash 0.1.0  ring, ulysses     needs flash-attn>=2.6: \
pip install --no-build-isolation flash-attn (builds with nvcc)
plain  available  plain-attn 1.0    -"""


@pytest.fixture
def three(world):
    requires = ["flash-attn>=2.6; extra == 'kernel'"]
    world.wheel("attn-flash", declaring(FLASH), version="0.1.0", requires=requires, extras=["kernel"])
    points = "[attn.backends]\nacme = acme_attn_declaration\n"
    world.wheel("acme-attn", "import acme_config", version="0.3.0", entry_points=points)
    world.wheel("plain-attn", declaring("'plain'"))
    return world


def test_the_table_is_the_one_of_the_design(three, capsys):
    assert cli.main(["list-backends"]) == 0
    assert capsys.readouterr() == (TABLE + "\n", "")


def test_a_switch_that_switches_nothing_is_told(three, capsys, monkeypatch):
    monkeypatch.setenv("ATTN_DISABLE", "plane, flash, acme_attn")
    assert cli.main(["list-backends"]) == 0
    assert capsys.readouterr().err == "ATTN_DISABLE: 'plane' matches no row of the list\n"


def test_ways_of_context_parallel_without_a_backward_say_so(world, capsys):
    both = "context_parallel=ContextParallelSupport(ring=True, ulysses=True)"
    world.wheel(
        "one-attn",
        declaring(f"""'one', {both}, constraints=Constraints(platforms={{'cpu'}}, dtypes={{'float32'}},
        masks={{'none'}}, lse=True, backward=True)"""),
    )
    world.wheel(
        "two-attn",
        declaring(f"""'two', {both}, constraints=Constraints(platforms={{'cpu'}}, dtypes={{'float32'}},
        masks={{'none'}}, lse=True, backward=No('inference only'))"""),
    )
    assert cli.main(["list-backends"]) == 0
    one, two = capsys.readouterr().out.splitlines()[1:]
    assert one.endswith("  ring (forward only), ulysses")
    assert two.endswith("  ring (forward only), ulysses (forward only)")


def test_what_was_never_run_on_its_hardware_says_so(world, capsys):
    world.wheel("acme-attn", declaring("'acme', unverified='written against acme 3.1 without a GPU'"))
    world.wheel("gone-attn", declaring("'gone', needs='no_such_kernel', unverified='no machine has one'"))
    assert cli.main(["list-backends"]) == 0
    acme, gone = capsys.readouterr().out.splitlines()[1:]
    assert acme.endswith("-                 not verified on hardware (written against acme 3.1 without a GPU)")
    assert "needs the module no_such_kernel: " in gone
    assert gone.endswith("; not verified on hardware (no machine has one)")
    with pytest.raises(DeclarationError, match="unverified is the reason as text, or None, found True"):
        BackendSpec(
            api=1, name="acme", summary="s", forward="a:b", unverified=True,
            constraints=Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}),
        )  # fmt: skip


def test_a_terminal_gets_the_reason_wrapped_under_its_column(three):
    lines = listing.as_table(three.rows(), 100).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) > 4
    start = lines[0].index("Reason")
    for line in lines[1:]:
        assert line[start - 2 : start] in ("  ", "")
    assert " ".join("".join(line[start:] + " " for line in lines).split()) == " ".join(
        "".join(line[start:] + " " for line in TABLE.splitlines()).split()
    )


def test_a_terminal_that_is_too_narrow_gets_whole_lines(three):
    assert listing.as_table(three.rows(), 50) == TABLE


def test_what_is_no_terminal_is_not_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    terminal, file = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    assert listing.width_of(terminal) == 77
    assert listing.width_of(file) is None


def test_with_nothing_installed_the_pip_line_is_given_and_json_is_an_empty_list(world, capsys):
    assert cli.main(["list-backends"]) == 0
    assert "pip install attn-native" in capsys.readouterr().out
    assert cli.main(["list-backends", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_json_has_every_field_and_the_whole_declaration(world, capsys):
    world.distribution("lib", "2.1")
    world.wheel(
        "acme-attn",
        declaring("""'acme', aliases={'b', 'a'},
        numerics=Approximate(0.02), backward='nowhere:backward', compile=No('it is a secret'),
        context_parallel=ContextParallelSupport(ring=True),
        constraints=[
            Constraints(platforms={'cuda', 'cpu'}, dtypes={'float16', 'bfloat16'}, masks={'none', 'bool'}, lse=True, causal=True,
                        compute_capability=CapabilityRange((8, 0)), head_dims=range(8, 257, 8), library='lib>=2',
                        rules=[Rule('no causal', lambda facts: facts.causal)], backward=Backward(dtypes={'bfloat16'})),
            Constraints(platforms={'cuda'}, dtypes={'float16'}, masks={'none'}, compute_capability={(9, 0), (8, 0)}, lse=True,
                        head_dims={128, 64, (192, 128)}, backward=No('inference only'))]"""),
    )
    assert cli.main(["list-backends", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    spec = row.pop("spec")
    assert row == {
        "name": "acme", "status": "available", "reason": "", "next_step": "", "distribution": "acme-attn",
        "version": "1.0", "qualified_name": "acme-attn:acme", "aliases": ["a", "b"],
    }  # fmt: skip
    assert list(spec) == [
        "api", "summary", "forward", "backward", "autograd", "needs", "compile", "first_call_compiles", "unverified",
        "numerics", "context_parallel", "context_parallel_modes", "constraints",
    ]  # fmt: skip
    assert spec["compile"] == {"supported": False, "reason": "it is a secret"}
    assert spec["numerics"] == {"approximate": True, "error": 0.02, "scores": None}
    assert spec["context_parallel"]["ring"] == {"supported": True, "reason": None}
    assert spec["context_parallel"]["hybrid"] == {"supported": False, "reason": "not declared"}
    first, second = spec["constraints"]
    assert first["platforms"] == ["cpu", "cuda"]
    assert first["compute_capability"] == {"minimum": [8, 0], "maximum": None}
    assert first["head_dims"] == {"minimum": 8, "maximum": 256, "step": 8}
    assert first["rules"] == ["no causal"]
    assert first["library"] == "lib>=2"
    assert first["backward"]["dtypes"] == ["bfloat16"]
    assert first["masks"]["bool"] == {"supported": True, "reason": None}
    assert first["masks"]["packed"] == {"supported": False, "reason": "not declared"}
    assert second["compute_capability"] == [[8, 0], [9, 0]]
    assert second["head_dims"] == [64, 128, [192, 128]]
    assert second["backward"] == {"supported": False, "reason": "inference only"}
    assert first.keys() == second.keys()


def test_no_wheel_writes_escapes_to_a_terminal(world, capsys):
    world.wheel("acme-attn", declaring("'acme', needs=Needs(module='gone', install='\\x1b[31mrun\\n\\tthis')"))
    assert cli.main(["list-backends"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\n") == 2


@pytest.mark.parametrize("arguments", [["list-backends", "--json"], ["explain", "--query", "1,4,1,8", "--json"]])
def test_what_a_wheel_prints_while_it_is_asked_is_no_part_of_the_json(world, capsys, arguments):
    world.wheel("acme-attn", "print('hello from acme')\n" + declaring("'acme'"))
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "acme" in str(json.loads(out))
    assert "hello from acme" in err


def test_a_stream_that_can_not_show_a_letter_gets_it_escaped(three):
    three.wheel("umlaut-attn", declaring("'umlaut', needs=Needs(module='gone', install='gr\\u00fc\\u00df euch')"))
    run = three.run("list-backends", PYTHONIOENCODING="ascii")
    assert "gr\\xfc\\xdf euch" in run.stdout


def test_a_reader_that_stops_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from attn_core import cli; sys.stdin.read(); sys.exit(cli.main(['list-backends']))"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_what_attn_refuses_is_said_on_stderr_with_status_2_and_no_traceback(monkeypatch, capsys):
    from attn_core import AttnError, registry

    def refuse(**_):
        msg = "acme refused: found 3; accepted: 4"
        raise AttnError(msg)

    monkeypatch.setattr(registry, "list_backends", refuse)
    assert cli.main(["list-backends"]) == 2
    assert capsys.readouterr() == ("", "attn: acme refused: found 3; accepted: 4\n")


def test_ctrl_c_ends_quietly(monkeypatch, capsys):
    from attn_core import registry

    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "list_backends", interrupt)
    assert cli.main(["list-backends"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["list-backends", "--no-such-option"]])
def test_arguments_that_make_no_sense_are_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: attn")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--query", "99999999999999,99999999999999,99,8"],
            "query: found shape .*; accepted: one that a tensor can have",
        ),
        (["--query", f"{10**30},1,1,8"], "query: found shape .*; accepted: one that a tensor can have"),
        (["--query", "1,4,2,8", "--device", "cuda:99x"], "device: found 'cuda:99x'; accepted: cpu, cuda.* cuda:0"),
        (["--query", "1,4,2,8", "--device", "cpu:"], "device: found 'cpu:'"),
        (["--query", "1,4,2,8", "--device", "cuda:99"], "Call: cuda, float32"),
        (["--query", "1,4,2,8", "--window-size", "-1,0"], r"window_size \(-1, 0\)"),
        (["--query", "1,4,2,8", "--window-size", "-1,-1", "--causal"], "causal$"),
        (["--query", "1,4,2,8", "--scale", "-0.5"], "Call: "),
    ],
)
def test_explain_takes_numbers_below_0_and_refuses_what_no_tensor_has(arguments, said, capsys):
    assert cli.main(["explain", *arguments]) == 0
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert " ".join(cli.COMMANDS[command][1].split()) in " ".join(capsys.readouterr().out.split())
