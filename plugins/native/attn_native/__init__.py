"""The attention kernels that torch itself brings, as backends of attn."""
