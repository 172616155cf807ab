"""Exact attention in chunks with an online softmax, as a backend of attn."""
