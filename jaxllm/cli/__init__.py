"""The command line: one file per verb, nothing heavy imported until a verb needs it."""
