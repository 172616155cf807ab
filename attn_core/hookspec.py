"""The one hook of attn, and the marks with which wheels implement it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attn_core.declaration import BackendSpec

PROJECT = "attn"
GROUP = "attn.backends"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def attn_backends() -> Iterable[BackendSpec]:
    """Declare the backends that this wheel brings.

    The module that implements it is named by an entry point of the group ``attn.backends``, and imports neither torch
    nor the kernel's library::

        from attn_core.plugin import BackendSpec, Constraints, No, hookimpl

        @hookimpl
        def attn_backends():
            yield BackendSpec(
                api=1, name="acme", summary="Acme fused attention", forward="acme_attn.kernel:forward",
                constraints=Constraints(
                    platforms={"cuda"}, dtypes={"float16", "bfloat16"}, masks={"none"},
                    causal=True, lse=True, dropout=No("the kernel keeps no random state")))
    """
    return ()
