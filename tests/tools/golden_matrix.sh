#!/usr/bin/env bash
# Run `perigee score` on golden cases in every splitting that must not change the result, and judge each run.
#
#   tests/tools/golden_matrix.sh [--quick|--ranks LIST] [--recorded] [--greedy N] [--jobs N] [--limit SECONDS]
#                                [--dtype fp32|bf16] [--device cpu|cuda] CASE_DIR...
#
# The splittings are all combinations of 1, 2 and 4 ranks, prompt chunks of 1, 7, 64 and all tokens, and latent caches
# cut into 1, 3 and 7 segments; --quick varies one at a time, --ranks (e.g. 2,4) only the ranks. Ranks that do not divide a
# case's heads are left out. compare.py judges. bf16 runs with the expected experts forced, as cases/README.md explains.
# --recorded leaves out traces, and what they show is not judged, so that a GPU may record decode steps (in fp32: it records none
# with forced experts). --greedy continues prompts by at most N tokens, for devices on which every step takes long; they are compared
# with the first of the case. --jobs runs so many beside each other; a run that takes longer than --limit (600) is killed with all its
# ranks and counts as failed. PERIGEE names the binary (default target/release/perigee), PYTHON an interpreter with NumPy and
# safetensors (default .venv/bin/python). The table shows the largest relative L2 of each kind of tensor; exit status 1 when a
# run failed or exceeded what compare.py allows.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
perigee=${PERIGEE:-$root/target/release/perigee}
python=${PYTHON:-$root/.venv/bin/python}
quick=false only_ranks=false ranks=1,2,4 recorded=false greedy= dtype=fp32 device=cpu jobs=1 limit=600

usage() {
    sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

while [[ ${1:-} == --* ]]; do
    case $1 in
        --quick) quick=true ;;
        --recorded) recorded=true ;;
        --dtype | --device | --greedy | --jobs | --limit | --ranks)
            (($# > 1)) || usage
            declare "${1#--}=$2"
            [[ $1 != --ranks ]] || only_ranks=true
            shift
            ;;
        *) usage ;;
    esac
    shift
done
(($# > 0)) || usage
for needed in "$perigee" "$python"; do
    if ! command -v "$needed" >/dev/null; then
        printf '%s is missing: cargo build --release makes the binary, tests/run setup the .venv\n' "$needed" >&2
        exit 1
    fi
done

# Ranks out of those given, chunk ("all": the whole prompt), segments.
combinations() {
    local number chunk segments changed
    for number in $1; do
        for chunk in all 64 7 1; do
            for segments in 1 3 7; do
                changed=$(((number != 1) + (segments != 1)))
                [[ $chunk == all ]] || changed=$((changed + 1))
                if [[ $only_ranks == true && $chunk-$segments != all-1 ]]; then
                    continue
                fi
                if [[ $quick == false && $only_ranks == false ]] || ((changed <= 1)); then
                    printf '%s %s %s\n' "$number" "$chunk" "$segments"
                fi
            done
        done
    done
}

# The number of greedy tokens of a case, which of the ranks divide its heads; and to the file, prompts and tokens to feed.
facts() {
    "$python" - "$1" "$ranks" "$greedy" "$2" <<'END'
import json
import pathlib
import re
import sys

from safetensors import safe_open
from safetensors.numpy import save_file

case, ranks = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
config = json.loads((case / "config.json").read_text())
heads = config["num_attention_heads"], config["linear_attn_config"]["num_heads"]
with safe_open(case / "expected.safetensors", "np") as expected:
    given = {name: expected.get_tensor(name) for name in expected.keys() if re.fullmatch("(prompt|greedy)_[0-9]+", name)}
    most = int(sys.argv[3] or len(given["greedy_0"]))
    save_file({name: ids[:most] if name.startswith("greedy") else ids for name, ids in given.items()}, sys.argv[4])
    print(min(most, len(given["greedy_0"])), *(n for n in ranks if all(h % int(n) == 0 for h in heads)))
END
}

# The largest relative L2 of each kind in compare.py's table, or what went wrong.
row_of() {
    awk -v status="$1" '
        $2 ~ /^[0-9.]+e[-+][0-9]+$/ {
            kind = $1; sub(/[_0-9]+$/, "", kind)
            if ($2 + 0 > worst[kind] + 0) worst[kind] = $2
        }
        /FAIL:/ && fault == "" { fault = $1 ": " substr($0, index($0, "FAIL: ") + 6) }
        { last = $0 }
        /^missing: / && fault == "" { fault = $0 }
        END {
            split("logits greedy_logits hidden kda_state", kinds, " ")
            for (i = 1; i <= 4; i++) printf " %13s", (kinds[i] in worst ? worst[kinds[i]] : "-")
            if (status == 0) print "  ok"; else print "  FAIL " (fault == "" ? last : fault)
        }' "$2"
}

# One run: its line of the table goes to a file when it is done, and a failure leaves one more.
run() {
    local number=$1 case_dir=$2 tokens=$3 fed=$4 ranks=$5 chunk=$6 segments=$7
    local expected=$case_dir/expected.safetensors out=$scratch/$1.safetensors log=$scratch/$1.log began=$EPOCHREALTIME status=0
    local command=("$perigee" score --model "$case_dir" --tokens "$tokens" --out "$out" --greedy "$fed" --feed "$tokens"
        --tp "$ranks" --segments "$segments" --device "$device" --dtype "$dtype")
    local judge=("$python" "$root/tests/cases/compare.py" "$case_dir" "$out" --dtype "$dtype")
    [[ $chunk == all ]] || command+=(--chunk "$chunk")
    [[ $dtype == fp32 ]] || command+=(--experts "$expected")
    if [[ $recorded == false ]]; then
        command+=(--trace)
        judge+=(--complete)
    fi
    timeout -k 5 "$limit" "${command[@]}" >"$log" 2>&1 </dev/null || status=$?
    {
        printf '%2s %5s %8s' "$ranks" "$chunk" "$segments"
        if ((status == 0)); then
            "${judge[@]}" >"$scratch/$number.table" 2>&1 || status=$?
            row=$(row_of "$status" "$scratch/$number.table")
            printf '%s %6s s %s\n' "${row:0:56}" "$(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')" "${row:58}"
        else
            printf '  FAIL: exit status %d\n' "$status"
            printf '%q ' "${command[@]}"
            printf '\n'
            tail -n 5 "$log"
        fi
    } >"$scratch/$number.row"
    rm -f "$out"
    ((status == 0)) || touch "$scratch/$number.failed"
    mv "$scratch/$number.row" "$scratch/$number.done"
}

# The lines of runs that are done, in the order in which they began.
show() {
    while [[ -e $scratch/$shown.done ]]; do
        cat "$scratch/$shown.done"
        shown=$((shown + 1))
        cat "$scratch/$shown.title" 2>/dev/null || true
    done
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
runs=0 shown=0
for case_dir in "$@"; do
    given=$scratch/$runs.given
    read -r fed fitting <<<"$(facts "$case_dir" "$given")"
    {
        printf '%s (%s, %s, %s greedy tokens)\n' "$case_dir" "$device" "$dtype" "$fed"
        printf '%2s %5s %8s %13s %13s %13s %13s %7s\n' tp chunk segments logits greedy_logits hidden kda_state seconds
    } >"$scratch/$runs.title"
    ((shown < runs)) || cat "$scratch/$runs.title"
    while read -r number chunk segments; do
        run "$runs" "$case_dir" "$given" "$fed" "$number" "$chunk" "$segments" &
        runs=$((runs + 1))
        while (($(jobs -rp | wc -l) >= jobs)); do
            wait -n || true
            show
        done
    done < <(combinations "$fitting")
done
wait
show
failures=$(find "$scratch" -name '*.failed' | wc -l)
printf '%d passed, %d failed\n' "$((runs - failures))" "$failures"
((shown == runs && failures == 0))
