"""The command line: `commands` says what each command takes and does, `main` reads arguments with Hydra."""
