"""What a call is, without its tensors and without its lengths: the input of every constraint."""

from __future__ import annotations

from dataclasses import dataclass

PLATFORMS = ("cpu", "cuda", "rocm", "mps", "npu", "xla")
DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
MASKS = ("none", "bool", "float", "key_padding", "packed")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of one call, as constraints and rules see them.

    No tensor and no length is in here, so that the outcome can be remembered in bounded memory.

    Attributes:
        platform: one of ``PLATFORMS``.
        compute_capability: (major, minor) of the device on cuda and rocm, else None.
        dtype: of query, key and value, after autocast; a name from ``DTYPES`` where it is one of those.
        head_dim: D, the last dimension of query and key.
        value_head_dim: Dv, the last dimension of value.
        heads: Hq, heads of query.
        key_heads: Hkv, heads of key and value.
        lengths: how Sq and Skv relate: "equal", "fewer queries" or "more queries".
        mask: the kind of ``attn_mask``, one of ``MASKS``.
        mask_dtype: dtype of a "float" mask, else None.
        mask_broadcast: for a "bool" or "float" mask, which of (B, Hq, Sq, Skv) are given once for all.
        mask_gradient: whether the float mask requires a gradient.
        causal: bottom-right causal.
        window_size: (left, right) in keys, -1 unlimited, or None. With causal, right is 0.
        softcap: whether scores are capped.
        dropout: whether dropout_p is above 0.
        deterministic: whether the same bits are asked for twice.
        return_lse: whether the log-sum-exp is asked for.
        backward: whether a gradient may be asked for.
        vmap: whether the call is inside a transform of ``torch.func``, whichever.
        forward_mode: whether forward-mode differentiation is on.
        compiled: whether the call is being traced by ``torch.compile``.
    """

    platform: str = "cpu"
    compute_capability: tuple[int, int] | None = None
    dtype: str = "float32"
    head_dim: int = 64
    value_head_dim: int = 64
    heads: int = 1
    key_heads: int = 1
    lengths: str = "equal"
    mask: str = "none"
    mask_dtype: str | None = None
    mask_broadcast: tuple[bool, bool, bool, bool] | None = None
    mask_gradient: bool = False
    causal: bool = False
    window_size: tuple[int, int] | None = None
    softcap: bool = False
    dropout: bool = False
    deterministic: bool = False
    return_lse: bool = False
    backward: bool = False
    vmap: bool = False
    forward_mode: bool = False
    compiled: bool = False

    @property
    def gqa(self) -> bool:
        """Whether several query heads share a key head."""
        return self.heads != self.key_heads

    @property
    def cross_lengths(self) -> bool:
        """Whether Sq and Skv differ."""
        return self.lengths != "equal"
