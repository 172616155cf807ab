"""attn as an attention implementation of transformers (5.0 and later): ``attn_implementation="attn"``.

Example:
    One sequence over the ranks of a mesh; each rank has the whole batch. Labels are shifted before they are sharded, since
    the model would shift those of its part alone, and the positions are those in the whole sequence::

        register(backend="native_flash")
        cp = ContextParallel(mesh)
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        ids, shifted, padding = (cp.shard(x) for x in (input_ids, shifted, attention_mask))
        with use_parallel(cp):
            out = model(input_ids=ids, attention_mask=padding, position_ids=cp.positions()[None],
                        labels=ids, shift_labels=shifted, num_items_in_batch=count)
        out.loss.backward()  # the sum over this rank's tokens, over count: losses and gradients are summed over the ranks
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from attn_core import CallRefused, Packed, attention, selection
from attn_core.integrations.parallel_masks import IN_A_CACHE, PartialMask, described
from attn_core.masks import packed_mask
from attn_core.parallel import scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from attn_core.parallel.context import ContextParallel

HARMLESS = frozenset(
    {
        "cache_position",
        "inputs_embeds",
        "is_first_iteration",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)
"""Keywords that models hand down to attention and that do not change what attention computes."""

IN_COMPILED_CODE = (
    "use_parallel: found a scope that is open around a compiled model; accepted: a model that is not compiled, since its masks "
    "are found with the other ranks while it runs. Open the scope around the model as it was before torch.compile"
)


def register(name: str = "attn", *, backend: str | Sequence[str] | None = None) -> None:
    """Register attn with transformers, attention and masks both.

    Args:
        name: what ``attn_implementation=`` calls it. It must not contain "flash", which would make transformers look for
            the package flash-attn.
        backend: a backend, or several in order of preference, for this name; None follows the rules of selection
            (scopes, bindings, ``set_backend``, ``ATTN_BACKEND``).

    Raises:
        CallRefused: for a name that transformers would take for something else, or under which another implementation is
            registered.
        BackendNotUsable: when the backend is unknown or not available.

    Example:
        >>> register()
        >>> register("attn_math", backend="native_math")
    """
    if not isinstance(name, str) or not name:
        msg = f'register: found {name!r}; accepted: the name that attn_implementation= is to have, such as "attn"'
        raise CallRefused(msg)
    if "flash" in name.lower() or "/" in name or "|" in name:
        msg = (
            f"register: found the name {name!r}; accepted: a name without 'flash', '/' and '|', which transformers reads "
            'as a package or kernel of its own. Choose another, such as "attn_fast", with backend='
        )
        raise CallRefused(msg)
    if _is_taken(name):
        msg = (
            f"register: found the name {name!r}, under which transformers has another implementation; accepted: a name of its "
            'own, such as "attn"'
        )
        raise CallRefused(msg)
    if backend is not None:
        selection.check(selection.normalized(backend))
    AttentionInterface.register(name, partial(attention_forward, backend=backend))
    AttentionMaskInterface.register(name, attention_mask)


def _is_taken(name: str) -> bool:
    """Whether a name is another's: what is registered under it did not come from here. "eager" has no function of its own."""
    functions, masks = map(_made, (AttentionInterface, AttentionMaskInterface))
    found = functions.get(name)
    ours = getattr(getattr(found, "func", None), "__module__", None) == __name__
    return not ours and (name == "eager" or found is not None or name in masks)


def _made(registry: Any) -> Any:
    return registry()


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    backend: str | Sequence[str] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one attention layer of a transformers model.

    Args:
        module: the layer; its ``is_causal`` counts where the argument is None.
        query: (B, Hq, Sq, D).
        key: (B, Hkv, Skv, D).
        value: (B, Hkv, Skv, Dv).
        attention_mask: what ``attention_mask`` below made, or the user's own 4-D mask. It holds the window already.
        dropout: probability to drop.
        scaling: of the scores; None is 1/sqrt(D).
        is_causal: whether a missing mask means causal.
        sliding_window: how many keys a query sees, its own included; counts where there is no mask.
        softcap: of the scores, before masking.
        deterministic: whether the same bits are wanted twice; ModernBERT says so of flash-attn.
        cu_seq_lens_q: offsets of sequences laid end to end; count where there is no mask.
        cu_seq_lens_k: the same among the keys.
        max_length_q: the longest of these.
        max_length_k: the same among the keys.
        backend: as in ``attention``.
        others: keywords that models hand down; harmless ones are ignored, every other is refused unless it is None.

    Returns:
        (B, Sq, Hq, Dv), and None for the probabilities.
    """
    _refuse_unknown(others)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    mask: Any = attention_mask
    window = None
    packed = None
    if cu_seq_lens_q is not None:
        packed = Packed(cu_seq_lens_q, cu_seq_lens_k, max_seqlen_q=max_length_q, max_seqlen_k=max_length_k)
    parallel = _ranks(mask)
    if isinstance(mask, PartialMask):
        causal, window = mask.described.causal, mask.described.window
        mask = mask.whole(key.shape[2], others.get("position_ids"), packed)
    elif mask is not None:
        causal = False
        if packed is not None:  # the mask may know of the sequences or not
            mask = _inside_sequences(mask, packed, query.shape[2], key.shape[2])
    else:
        mask = packed
    cuts = parallel is not None or (sliding_window is not None and key.shape[2] > sliding_window)
    if attention_mask is None and sliding_window is not None and cuts:
        window = _causal_window(sliding_window, causal=causal)
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        causal=causal,
        scale=scaling,
        window_size=window,
        softcap=softcap,
        dropout_p=dropout,
        deterministic=bool(deterministic),
        backend=backend,
        parallel=parallel,
    )
    return out, None


def _ranks(mask: Any = None) -> Any:
    """The ranks that a mask was made for, or those of ``use_parallel``, in a recomputation those of its forward.

    Code that is traced is refused where they can't be told.
    """
    if torch.compiler.is_dynamo_compiling() and scope.is_open:
        raise CallRefused(IN_COMPILED_CODE)
    if isinstance(mask, PartialMask):
        return mask.parallel
    return None if torch.compiler.is_dynamo_compiling() else scope.of_call()


def _inside_sequences(mask: torch.Tensor, packed: Packed, query_length: int, key_length: int) -> torch.Tensor:
    inside = packed_mask(packed, query_length, key_length)[None, None]
    return mask & inside if mask.dtype == torch.bool else mask.masked_fill(~inside, float("-inf"))


def _causal_window(sliding_window: int, *, causal: bool) -> tuple[int, int]:
    if causal:
        return (sliding_window - 1, -1)
    msg = (
        f"sliding_window: found {sliding_window} without a mask on a layer that is not causal; models differ in what that "
        "means, so the mask has to come from transformers' mask functions"
    )
    raise CallRefused(msg)


def _refuse_unknown(others: dict[str, Any]) -> None:
    if others.get("output_attentions"):
        msg = 'output_attentions: attn returns no probabilities; use attn_implementation="eager" for them'
        raise CallRefused(msg)
    for name, value in others.items():
        if value is not None and name not in HARMLESS and name != "output_attentions":
            msg = (
                f"transformers handed the keyword {name!r} to attention, and attn does not know what it means, so it can't "
                f"ignore it; this model needs another attn_implementation. Ignored as harmless: {', '.join(sorted(HARMLESS))}"
            )
            raise CallRefused(msg)


def attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> torch.Tensor | PartialMask | None:
    """Make the mask of a layer type, as transformers asks for it once per forward.

    Refused for models whose attention is code of their own, which would read this mask as another.

    None is returned only where the layer's own "causal" (bottom-right) or "everything" says the same: no padding, no
    window that cuts, and for causal the last query on the last key. A static cache, whose empty slots lie behind the
    last query, always gets a mask.

    Inside ``use_parallel`` the lengths are those of this rank's part, and the layers find the mask of the whole sequence.

    Returns:
        None, or bool broadcastable to (B, 1, Sq, Skv), True may attend. Padding alone is (B, 1, 1, Skv).

    Raises:
        CallRefused: such a model; and inside ``use_parallel`` what isn't a forward of a whole sequence.
    """
    _refuse_models_of_their_own(type(others.get("config")))
    parallel = _ranks()
    if parallel is not None:
        sizes = (batch_size, q_length, kv_length)
        return _partial_mask(
            parallel, mask_function, attention_mask, sizes, (q_offset, kv_offset), others.get("device")
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
    cuts = local_size is not None and kv_length >= local_size
    skip = allow_is_bidirectional_skip or (
        allow_is_causal_skip and _is_plain(q_offset) and q_offset + q_length == kv_offset + kv_length
    )
    if skip and not cuts and _keeps_everything(padding):
        return None
    if mask_function is bidirectional_mask_function and padding is not None:
        return padding[:, None, None, :]
    make: Callable[..., torch.Tensor | None] = sdpa_mask
    return make(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **others,
    )


MIXED = frozenset({"BigBirdPegasusConfig", "NllbMoeConfig", "PegasusXConfig"})
"""Configurations of models that use the attention interface in some layers, and have attention of their own in others."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _refuse_models_of_their_own(config: type) -> None:
    """Refuse a configuration all of whose models have attention of their own, and so may read any mask as theirs."""
    if config in _supported:
        return
    models = _models_of(config)
    if not models or (config.__name__ not in MIXED and any(map(_uses_interface, models))):
        _supported.add(config)
        return
    msg = (
        f"{config.__name__}: found a model with attention code of its own, to which transformers hands attn's masks and not its "
        'calls; accepted: models that use the attention interface of transformers. Next: attn_implementation="eager"; or, in '
        f"a model of yours that does use it, _supports_attention_backend = True in {models[0].__name__}"
    )
    raise CallRefused(msg)


_supported: set[type] = set()
"""Configurations whose models use the interface, or of which none is known."""


def _models_of(config: type) -> list[type[PreTrainedModel]]:
    """The models that are made of a configuration, or else of the class that it derives from, with the family's base first."""
    found = list(_models(PreTrainedModel))
    of_each = ([model for model in found if model.config_class is kind] for kind in config.__mro__)
    return next((models for models in of_each if models), [])


def _uses_interface(model: type[PreTrainedModel]) -> bool:
    """By what a model says of itself, or else by transformers' own look at its source."""
    says = model._supports_attention_backend or model._supports_sdpa  # noqa: SLF001
    look: Callable[[], bool] | None = getattr(model, "_can_set_attn_implementation", None)
    return bool(says or (look is not None and look()))


def _models(kind: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
    for model in kind.__subclasses__():
        yield model
        yield from _models(model)


def _partial_mask(
    parallel: ContextParallel,
    mask_function: Callable[..., Any],
    padding: torch.Tensor | None,
    sizes: tuple[int, int, int],
    offsets: tuple[Any, Any],
    device: Any,
) -> PartialMask:
    """Refuse, inside ``use_parallel``, what isn't a forward of a whole sequence, and note what is said of the rest."""
    batch, queries, keys = sizes
    found = described(mask_function)
    continued = any(not isinstance(offset, int) or offset for offset in offsets)
    if continued or ((found.causal or found.window) and queries != keys):
        raise CallRefused(IN_A_CACHE.format(found=f"at {offsets[0]}, {queries} for {keys} keys"))
    if padding is not None and tuple(padding.shape) != (batch, keys):
        msg = (
            f"attention_mask: found shape {tuple(padding.shape)}; accepted in context parallel: (B, S) = {(batch, keys)}, "
            "sharded as input_ids are"
        )
        raise CallRefused(msg)
    return PartialMask(parallel, found, None if padding is None else padding.bool(), *sizes, device)


def _is_plain(offset: int | torch.Tensor) -> bool:
    """Whether the offset may be read: a number, or a tensor outside traced code."""
    return not isinstance(offset, torch.Tensor) or not torch.compiler.is_compiling()


def _keeps_everything(padding: torch.Tensor | None) -> bool:
    """Whether no key is padding; values are not read in traced code."""
    if padding is None:
        return True
    return not torch.compiler.is_compiling() and bool(padding.all())
