"""``python -m amortized``: the command line."""

from amortized.cli import main

if __name__ == "__main__":
    main()
