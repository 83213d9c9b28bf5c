"""The benchmark: how long a granted transfer takes, against the copy that cannot be avoided."""
