"""`python -m fastserve` starts the launcher."""

from fastserve.launcher import main

if __name__ == "__main__":
    main()
