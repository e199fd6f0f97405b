"""The Lightning adapters: no algorithms, only what Lightning calls and what it expects back."""
