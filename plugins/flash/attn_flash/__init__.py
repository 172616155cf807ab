"""The flash-attention libraries as backends of attn: flash (2), flash_3 and flash_4."""
