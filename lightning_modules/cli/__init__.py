"""The command `mobileone`: one file a group of subcommands."""
