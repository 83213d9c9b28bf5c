"""The demo: a language process and an encoder process of their own, and what they moved."""
