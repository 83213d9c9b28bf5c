"""Runnable examples of aiomm; each file says in its first lines how to run it."""
