"""The command `mobileone`: a table of subcommands, whose parsers come from functions' signatures.

`commands` is the table, `main` finds a row and completes words, `execute` parses, calls, prints and
saves, `help` keeps what `--help` says.
"""
