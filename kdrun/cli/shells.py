"""Tab completion in bash, zsh and fish: the scripts, where they are installed, and the answer to a shell that asks.

A shell hands over the line up to the cursor in `_KDRUN_LINE` with `_KDRUN_COMPLETE=complete_<shell>`, and gets one whole word per line.
Typer's own scripts are not used: they hand bash's words over, which bash has cut at every `=` and `:`, and put a space after `optim.lr=`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ASKED, LINE = "_KDRUN_COMPLETE", "_KDRUN_LINE"

# Readline replaces only what follows the last of its word breaks, so that part alone is handed back to it.
BASH = r"""
_kdrun_completion() {
    local line="${COMP_LINE:0:COMP_POINT}" typed kept
    mapfile -t COMPREPLY < <(_KDRUN_COMPLETE=complete_bash _KDRUN_LINE="$line" "$1" 2>/dev/null)
    typed="${line##*[[:space:]]}"
    kept="${typed%"${typed##*["$COMP_WORDBREAKS"]}"}"
    COMPREPLY=("${COMPREPLY[@]#"$kept"}")
    [[ "${COMPREPLY[*]}" == *[=./] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _kdrun_completion kdrun
"""
ZSH = r"""
#compdef kdrun
_kdrun_completion() {
    local -a offers open whole
    offers=("${(@f)$(_KDRUN_COMPLETE=complete_zsh _KDRUN_LINE="${(j: :)words[1,CURRENT-1]} $PREFIX" ${words[1]} 2>/dev/null)}")
    offers=(${offers:#})
    open=(${(M)offers:#*[=./]})
    whole=(${offers:#*[=./]})
    (( $#open )) && compadd -S '' -a open
    (( $#whole )) && compadd -a whole
    (( $#offers )) || { compset -P '*='; _files }
}
if [[ $funcstack[1] == _kdrun ]]; then _kdrun_completion "$@"; else compdef _kdrun_completion kdrun; fi
"""
FISH = r"""
function __kdrun_completion
    set -l offers (_KDRUN_COMPLETE=complete_fish _KDRUN_LINE=(commandline -cp | string collect) kdrun 2>/dev/null)
    if test (count $offers) -gt 0
        printf '%s\n' $offers
    else
        set -l word (commandline -ct)
        set -l kept (string match -r '^.*=' -- $word; or echo)
        printf '%s\n' "$kept"(__fish_complete_path (string replace -r '^.*=' '' -- $word))
    end
end
complete --command kdrun --no-files --arguments '(__kdrun_completion)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def answer(asked: str) -> None:
    """What a shell that asked gets to read."""
    import typer.main

    from kdrun.cli.app import app
    from kdrun.cli.complete import offered

    try:
        words = offered(os.environ.get(LINE, ""), typer.main.get_command(app))
    except Exception:  # a shell that waits for an offer has no use for a reason
        return
    bash = asked.endswith("bash")
    for word in words:
        print(word.replace(" ", "\\ ") if bash else word)  # the other two quote by themselves


def show(shell: str | None) -> None:
    """Print a shell's script."""
    sys.stdout.write(SCRIPTS[known(shell)].lstrip("\n"))


def install(shell: str | None) -> None:
    """Write the shell's script to where it looks for such, and say so."""
    import typer

    shell, home = known(shell), Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = {
        "bash": data / "bash-completion" / "completions" / "kdrun",
        "zsh": home / ".zfunc" / "_kdrun",
        "fish": settings / "fish" / "completions" / "kdrun.fish",
    }
    file = files[shell]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(SCRIPTS[shell].lstrip("\n"), encoding="utf-8")
    if shell == "bash":  # bash-completion would find it by itself, where there is that
        _add_line(home / ".bashrc", f"source '{file}'")
    elif shell == "zsh":
        _add_line(Path(os.environ.get("ZDOTDIR") or home) / ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit")
    typer.echo(f"{shell} completion is in {file}; it works in the next terminal")


def known(shell: str | None) -> str:
    """A shell by its name, or without one that in which this runs. Raises `Refused` where there is no script for it."""
    from kdrun.errors import Problem, Refused, did_you_mean

    name = shell or _around()
    if name not in SCRIPTS:
        what = f"there is no completion for '{name}'" if name else "it is not clear which shell this is"
        raise Refused(Problem(what, "--shell", "command line", did_you_mean(name, SCRIPTS)))
    return name


def _around() -> str:
    import shellingham  # type: ignore[import-untyped]  # comes with typer

    try:
        return str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        return Path(os.environ.get("SHELL", "")).name


def _add_line(file: Path, line: str) -> None:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if line not in text.splitlines():
        file.write_text(f"{text.rstrip()}\n{line}\n".lstrip("\n"), encoding="utf-8")
