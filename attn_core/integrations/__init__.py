"""attn inside other libraries. Each module imports its library, so import the one you need."""
