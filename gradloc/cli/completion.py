"""Scripts that complete a command line with Tab, made from the commands' own description so that they can't fall behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from gradloc.core.names import meant
from gradloc.errors import ConfigError

if TYPE_CHECKING:
    from gradloc.cli.commands import Command

PATHS = "<path>"
"""In place of a setting's values: files and directories."""


def script(shell: str, commands: Mapping[str, Command]) -> str:
    """The script for one shell; ``source <(gradloc completion bash)`` and the like take it in.

    Raises:
        ConfigError: another shell.
    """
    if shell not in _SHELLS:
        raise ConfigError(f"shell={shell!r} must be one of {', '.join(_SHELLS)}{meant(shell, _SHELLS)}.")
    return _SHELLS[shell](commands)


def values_of(command: Command) -> dict[str, list[str] | str]:
    """What may follow each setting's ``=``: a list of values, `PATHS`, or nothing that can be listed.

    Examples:
        >>> from gradloc.cli.commands import COMMANDS
        >>> values_of(COMMANDS["report"])["wandb"]
        ['true', 'false']
    """
    found: dict[str, list[str] | str] = {}
    for setting in fields(command.settings):
        choices = command.choices.get(setting.name) or tuple(command.presets if setting.name == "preset" else ())
        if choices:
            found[setting.name] = list(choices)
        elif setting.type == "bool":
            found[setting.name] = ["true", "false"]
        elif setting.name in (*command.reads, *command.files, *command.directories):
            found[setting.name] = PATHS
        else:
            found[setting.name] = []
    return found


def _bash(commands: Mapping[str, Command]) -> str:
    cases = []
    for name, command in commands.items():
        values = values_of(command)
        cases.append(f"    {name}) settings='{' '.join(f'{key}=' for key in values)}' ;;")
    known = [
        f"    {name}.{key}) {'paths=1' if listed == PATHS else _bash_list(listed)} ;;"
        for name, command in commands.items()
        for key, listed in values_of(command).items()
        if listed
    ]
    lines = [
        "# Completes gradloc. Take it in with: source <(gradloc completion bash)",
        "_gradloc() {",
        "  local line=\"${COMP_LINE:0:COMP_POINT}\" word command key value settings= values= paths= IFS=$' \\t\\n'",
        "  # A space behind a backslash belongs to a word.",
        "  line=${line//\\\\ /$'\\1'}",
        '  word="${line##*[[:space:]]}"',
        "  # The words before the cursor, whatever COMP_WORDBREAKS makes of = and :",
        '  local words=(${line%"$word"})',
        "  COMPREPLY=()",
        "  if (( ${#words[@]} < 2 )); then",
        f"    COMPREPLY=($(compgen -W '{' '.join(commands)} --help --version' -- \"$word\"))",
        "    return",
        "  fi",
        '  command="${words[1]}"',
        '  if [[ "$word" != *=* ]]; then',
        '    case "$command" in',
        *cases,
        "    esac",
        '    [[ "$command" == completion ]] && settings="bash zsh fish"',
        '    COMPREPLY=($(compgen -W "$settings --help --multirun" -- "$word"))',
        '    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace 2>/dev/null',
        "    return",
        "  fi",
        '  key="${word%%=*}" value="${word#*=}"',
        "  value=${value//$'\\1'/ }",
        '  case "$command.$key" in',
        *known,
        "  esac",
        '  if [[ -n "$paths" ]]; then',
        "    local IFS=$'\\n'",
        "    compopt -o filenames 2>/dev/null",
        '    COMPREPLY=($(compgen -f -- "$value"))',
        "  else",
        '    COMPREPLY=($(compgen -W "$values" -- "$value"))',
        "  fi",
        "  # Where = or : end a word, only what follows them is replaced.",
        '  local breaks="${word%"${word##*[$COMP_WORDBREAKS]}"}" index',
        '  if [[ "$COMP_WORDBREAKS" == *=* ]]; then breaks="${breaks#"$key="}"; else breaks=; fi',
        '  for index in "${!COMPREPLY[@]}"; do',
        '    if [[ "$COMP_WORDBREAKS" == *=* ]]; then',
        '      COMPREPLY[index]="${COMPREPLY[index]#"$breaks"}"',
        "    else",
        '      COMPREPLY[index]="$key=${COMPREPLY[index]}"',
        "    fi",
        "  done",
        "}",
        "complete -F _gradloc gradloc",
    ]
    return "\n".join(lines) + "\n"


def _bash_list(listed: list[str] | str) -> str:
    return f"values='{' '.join(listed)}'"


def _zsh(commands: Mapping[str, Command]) -> str:
    from gradloc.cli.main import purpose

    described = [f"    '{name}:{_plain(purpose(command))}'" for name, command in commands.items()]
    lines = [
        "#compdef gradloc",
        "# Completes gradloc. Take it in with: source <(gradloc completion zsh), after compinit",
        "_gradloc() {",
        "  local -a commands settings values",
        "  commands=(",
        *described,
        "  )",
        "  if (( CURRENT == 2 )); then",
        "    _describe command commands",
        "    return",
        "  fi",
        '  if [[ "$PREFIX" != *=* ]]; then',
        '    case "$words[2]" in',
        *(f"      {name}) settings=({' '.join(f'{key}=' for key in values_of(c))}) ;;" for name, c in commands.items()),
        "    esac",
        '    [[ "$words[2]" == completion ]] && compadd bash zsh fish',
        "    compadd -S '' -- $settings",
        "    compadd -- --help --multirun",
        "    return",
        "  fi",
        '  local key="${PREFIX%%=*}"',
        "  compset -P '*='",
        '  case "$words[2].$key" in',
        *(
            f"    {name}.{key}) {'_files; return' if listed == PATHS else 'values=(' + ' '.join(listed) + ')'} ;;"
            for name, c in commands.items()
            for key, listed in values_of(c).items()
            if listed
        ),
        "  esac",
        "  compadd -- $values",
        "}",
        "compdef _gradloc gradloc",
    ]
    return "\n".join(lines) + "\n"


def _fish(commands: Mapping[str, Command]) -> str:
    from gradloc.cli.main import purpose

    names = " ".join(commands)
    lines = [
        "# Completes gradloc. Take it in with: gradloc completion fish | source",
        "complete -c gradloc -f",
        "# A path after key=, completed as a path and put behind the key again.",
        "function __gradloc_paths",
        "  set -l key (string replace -r '=.*' '' -- (commandline -ct))",
        "  for path in (__fish_complete_path (string replace -r '^[^=]*=' '' -- (commandline -ct)))",
        '    echo "$key=$path"',
        "  end",
        "end",
    ]
    for name, command in commands.items():
        lines.append(
            f"complete -c gradloc -n 'not __fish_seen_subcommand_from {names}' -a {name} -d '{_plain(purpose(command))}'"
        )
        chosen = f"__fish_seen_subcommand_from {name}"
        lines.append(f"complete -c gradloc -n '{chosen}' -a '--help --multirun'")
        if name == "completion":
            lines.append(f"complete -c gradloc -n '{chosen}' -a 'bash zsh fish'")
        for key, listed in values_of(command).items():
            offered = " ".join(f"{key}={value}" for value in listed) if isinstance(listed, list) else ""
            lines.append(
                f"complete -c gradloc -n '{chosen}' -a '{offered or f'{key}='}' -d '{_plain(command.about.get(key, 'one JSON object'))}'"
            )
            if listed == PATHS:
                started = f'{chosen}; and string match -q "{key}=*" -- (commandline -ct)'
                lines.append(f"complete -c gradloc -n '{started}' -a '(__gradloc_paths)'")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that stands between single quotes in a shell, and that a colon in doesn't cut."""
    return text.replace("'", "’").replace(":", " –")


_SHELLS: dict[str, Callable[[Mapping[str, Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}

__all__ = ["PATHS", "script", "values_of"]
