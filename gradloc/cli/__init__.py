"""The command line: `main` reads words, `commands` describes, `stages` does the work, `sweep` does it for several values."""
