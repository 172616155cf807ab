"""The conformance kit: chunked is held to what it declares."""

from attn_core.testing import parametrize_with_checks


@parametrize_with_checks("chunked", quick=True)
def test_chunked(check):
    check()
