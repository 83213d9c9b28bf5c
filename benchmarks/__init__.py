"""Measurements, each repeatable with one command; no test asserts any of them."""
