# Tab completion of groups, options and keys for `python -m src.train`, `src.evaluate`, `src.embed` and `src.export` in bash:
#
#     source scripts/completion.bash
#
# Hydra computes the completions; the function that it can install handles `python FILE.py` but not `python -m MODULE`.
_src_completion() {
    [[ $COMP_LINE =~ ^[[:space:]]*([^ ]*python[0-9.]*)[[:space:]]+-m[[:space:]]+(src\.(train|evaluate|embed|export))[[:space:]]+(.*)$ ]] || return
    local python=${BASH_REMATCH[1]} module=${BASH_REMATCH[2]} line="${BASH_REMATCH[2]} ${BASH_REMATCH[4]}" choices
    local folder=()
    [[ $line =~ (--config-dir|-cd)[=\ ]+([^ ]+)\  ]] && folder=(--config-dir "${BASH_REMATCH[2]}")
    choices=$(COMP_LINE=$line "$python" -m "$module" "${folder[@]}" --shell-completion query=bash 2>/dev/null)
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "${COMP_WORDS[COMP_CWORD]}")
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _src_completion python python3
