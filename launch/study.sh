#!/usr/bin/env bash
# From a fresh checkout to the answer of a study.
# Started again, it does only what is left to do.
set -euo pipefail
{ : <&0; } 2>/dev/null || exec </dev/null

CORPORA=data/study

usage() {
    cat <<'USAGE'
Usage: launch/study.sh [STUDY] [options of est-ds compare]

Makes the environment (.venv), prepares the studies' corpora (data/study: source code of
the packages that this project installs) and runs `est-ds compare STUDY`
(default: configs/study/quick.yaml). An interrupted study goes on.

  --help         this text

Environment: PYTHON names the Python 3.10+ to use; EST_DS_TORCH_INDEX a package index
to take torch from.
USAGE
}

case ${1:-} in
    --help | -h)
        usage
        exit 0
        ;;
esac

. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
study=configs/study/quick.yaml
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    study=$(realpath -- "$1")
    shift
fi
cd "$EST_DS_ROOT"
est_ds_has_gpu || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

is_complete() {
    [ -f "$CORPORA/$1.manifest.json" ] &&
        python -m data_prep verify --out "$CORPORA/$1" --tokenizer "$CORPORA/tokenizer" \
            >/dev/null 2>&1
}

# Packages of launch/requirements.txt whose files are the same on every machine.
prepare() {
    local packages part
    packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python -m data_prep corpus --out "$CORPORA/code" --input \
        "$packages"/{accelerate,datasets,pydantic} \
        "$packages"/deepspeed/{runtime,inference,ops} \
        "$packages"/transformers/{generation,integrations,utils,quantizers,data,cli}
    python -m data_prep tokenizer --input "$CORPORA/code.train.jsonl" \
        --out "$CORPORA/tokenizer" --vocab 1024
    for part in train valid; do
        python -m data_prep pack --input "$CORPORA/code.$part.jsonl" \
            --tokenizer "$CORPORA/tokenizer" --out "$CORPORA/$part"
    done
    python -m data_prep pack --input "$packages/transformers/pipelines" \
        --tokenizer "$CORPORA/tokenizer" --out "$CORPORA/few"
}

if is_complete train && is_complete valid && is_complete few; then
    echo "study: the corpora in $CORPORA are complete"
else
    echo "study: preparing the corpora in $CORPORA"
    prepare
fi
exec est-ds compare "$study" "$@"
