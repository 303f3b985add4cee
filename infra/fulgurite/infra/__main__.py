"""`python -m fulgurite.infra` is the command `fulgurite`: for child processes, which must run this very interpreter."""

from fulgurite.infra.cli import main

if __name__ == "__main__":
    main()
