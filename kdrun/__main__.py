"""`python -m kdrun` is `kdrun`."""

from kdrun.cli import main

if __name__ == "__main__":
    main()
