"""`python -m aiomm` is `aiomm`."""

from .cli import main

if __name__ == "__main__":
    main()
