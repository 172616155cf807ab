"""xformers' memory-efficient attention as backends of attn: its own choice, and one operator each."""
