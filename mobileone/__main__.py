"""`python -m mobileone`: the same as the command `mobileone`."""

from lightning_modules.cli.main import main

if __name__ == "__main__":
    main()
