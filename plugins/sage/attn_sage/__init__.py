"""SageAttention as backends of attn: quantised, approximate, and chosen only by name."""
