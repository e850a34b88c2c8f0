"""The command `mobileone`: one file a group of subcommands.

`main` has the table of subcommands and imports the one that is called.
"""
