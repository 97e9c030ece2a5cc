#!/usr/bin/env bash
# From a fresh checkout to a trained small model and its report.
# Started again, it does only what is left to do.
set -euo pipefail
{ : <&0; } 2>/dev/null || exec </dev/null

CORPUS=data/stdlib
RUN_DIR=runs/quickstart

usage() {
    cat <<'USAGE'
Usage: launch/quickstart.sh [--steps N] [--processes N] [--fresh]

Makes the environment (.venv), prepares the embedded corpus (data/stdlib), trains
configs/run/quickstart.yaml in runs/quickstart and writes its report. An interrupted
run is resumed.

  --steps N      optimizer steps (default: the run file's); phases keep their shares
  --processes N  training processes (default: what the run file's layout needs)
  --fresh        move a former runs/quickstart aside and begin anew
  --help         this text

Environment: PYTHON names the Python 3.10+ to use; EST_DS_TORCH_INDEX a package index
to take torch from.
USAGE
}

reject() {
    printf 'quickstart: error: %s\n' "$1" >&2
    exit 2
}

steps='' processes='' fresh=''
while [ $# -gt 0 ]; do
    flag=$1
    shift
    case $flag in
        --help | -h)
            usage
            exit 0
            ;;
        --fresh)
            fresh=yes
            continue
            ;;
        --steps=* | --processes=*)
            value=${flag#*=}
            flag=${flag%%=*}
            ;;
        --steps | --processes)
            [ $# -gt 0 ] || reject "$flag needs a number, as in $flag 8."
            value=$1
            shift
            ;;
        *) reject "unknown argument '$flag'; allowed: --steps N, --processes N, --fresh, --help." ;;
    esac
    [[ $value =~ ^[1-9][0-9]{0,8}$ ]] ||
        reject "$flag is '$value'; it must be a whole number from 1 up, as in $flag 8."
    case $flag in
        --steps) steps=$value ;;
        --processes) processes=$value ;;
    esac
done

. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd "$EST_DS_ROOT"
est_ds_has_gpu || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

corpus_is_complete() {
    local part
    for part in train valid; do
        [ -f "$CORPUS/$part.manifest.json" ] || return 1
        python -m data_prep verify --out "$CORPUS/$part" --tokenizer "$CORPUS/tokenizer" \
            >/dev/null 2>&1 || return 1
    done
}

prepare_corpus() {
    local part
    python -m data_prep corpus --out "$CORPUS/corpus"
    python -m data_prep tokenizer --input "$CORPUS/corpus.train.jsonl" \
        --out "$CORPUS/tokenizer" --vocab 4096
    for part in train valid; do
        python -m data_prep pack --input "$CORPUS/corpus.$part.jsonl" \
            --tokenizer "$CORPUS/tokenizer" --out "$CORPUS/$part"
    done
    for part in train valid; do
        python -m data_prep verify --out "$CORPUS/$part" --tokenizer "$CORPUS/tokenizer"
    done
}

# A former run is never deleted: it gets the first free number.
move_former_run() {
    local number=1
    [ -e "$RUN_DIR" ] || return 0
    while [ -e "$RUN_DIR.old-$number" ]; do
        number=$((number + 1))
    done
    mv "$RUN_DIR" "$RUN_DIR.old-$number"
    echo "quickstart: the former run is now $RUN_DIR.old-$number"
}

if corpus_is_complete; then
    echo "quickstart: corpus $CORPUS is complete"
else
    echo "quickstart: preparing the corpus in $CORPUS"
    prepare_corpus
fi
[ -z "$fresh" ] || move_former_run

had_run=''
[ ! -e "$RUN_DIR" ] || had_run=yes
command=(est-ds train configs/run/quickstart.yaml "run_dir=$RUN_DIR")
[ -z "$steps" ] || command+=("steps=$steps")
[ -z "$processes" ] || command+=(--processes "$processes")
echo "quickstart: ${command[*]}"
code=0
"${command[@]}" || code=$?
if [ "$code" -eq 2 ] && [ -n "$had_run" ]; then
    echo "quickstart: $RUN_DIR holds a former run. If that is the cause, start with its own" \
        "settings, or move it aside: launch/quickstart.sh --fresh${steps:+ --steps $steps}" >&2
fi
[ "$code" -eq 0 ] || exit "$code"

est-ds report "$RUN_DIR"
echo "quickstart: the report is $EST_DS_ROOT/$RUN_DIR/report.html"
