#!/usr/bin/env bash
# Run `perigee score` on golden cases in every splitting that must not change the result, and judge each run.
#
#   tests/tools/golden_matrix.sh [--quick|--ranks] [--dtype fp32|bf16] [--device cpu|cuda] CASE_DIR...
#
# The splittings are all combinations of 1, 2 and 4 ranks, prompt chunks of 1, 7, 64 and all tokens, and latent caches
# cut into 1, 3 and 7 segments; --quick varies one at a time, --ranks only the ranks, from 2. compare.py judges. bf16 runs with the expected experts
# forced, as cases/README.md explains. PERIGEE names the binary (default target/release/perigee), PYTHON an interpreter
# with NumPy and safetensors (default .venv/bin/python). The table shows the largest relative L2 of each kind of tensor;
# exit status 1 when a run failed or a limit was exceeded.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
perigee=${PERIGEE:-$root/target/release/perigee}
python=${PYTHON:-$root/.venv/bin/python}
quick=false only_ranks=false dtype=fp32 device=cpu

usage() {
    sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

while [[ ${1:-} == --* ]]; do
    case $1 in
        --quick) quick=true ;;
        --ranks) quick=true only_ranks=true ;;
        --dtype | --device)
            (($# > 1)) || usage
            declare "${1#--}=$2"
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

# Ranks, chunk ("all": the whole prompt), segments.
combinations() {
    local ranks chunk segments changed
    for ranks in 1 2 4; do
        for chunk in all 64 7 1; do
            for segments in 1 3 7; do
                changed=$(((ranks != 1) + (segments != 1)))
                [[ $chunk == all ]] || changed=$((changed + 1))
                if [[ $only_ranks == true ]] && ((ranks == 1)); then
                    continue
                fi
                if [[ $quick == false ]] || ((changed <= 1)); then
                    printf '%s %s %s\n' "$ranks" "$chunk" "$segments"
                fi
            done
        done
    done
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

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failures=0 runs=0
for case_dir in "$@"; do
    expected=$case_dir/expected.safetensors
    greedy=$("$python" -c '
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "np") as f:
    print(len(f.get_tensor("greedy_0")))' "$expected")
    printf '%s (%s, %s, %s greedy tokens)\n' "$case_dir" "$device" "$dtype" "$greedy"
    printf '%2s %5s %8s %13s %13s %13s %13s %7s\n' tp chunk segments logits greedy_logits hidden kda_state seconds
    while read -r ranks chunk segments; do
        command=("$perigee" score --model "$case_dir" --tokens "$expected" --out "$scratch/out.safetensors"
            --greedy "$greedy" --feed "$expected" --trace --tp "$ranks" --segments "$segments"
            --device "$device" --dtype "$dtype")
        [[ $chunk == all ]] || command+=(--chunk "$chunk")
        [[ $dtype == fp32 ]] || command+=(--experts "$expected")
        rm -f "$scratch/out.safetensors"
        began=$EPOCHREALTIME
        status=0
        "${command[@]}" >"$scratch/log" 2>&1 </dev/null || status=$?
        seconds=$(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
        runs=$((runs + 1))
        printf '%2s %5s %8s' "$ranks" "$chunk" "$segments"
        if ((status == 0)); then
            "$python" "$root/tests/cases/compare.py" "$case_dir" "$scratch/out.safetensors" \
                --dtype "$dtype" --complete >"$scratch/table" 2>&1 || status=$?
            row=$(row_of "$status" "$scratch/table")
            printf '%s %6s s %s\n' "${row:0:56}" "$seconds" "${row:58}"
        else
            printf '  FAIL: exit status %d\n' "$status"
            printf '%q ' "${command[@]}"
            printf '\n'
            tail -n 5 "$scratch/log"
        fi
        ((status == 0)) || failures=$((failures + 1))
    done < <(combinations)
done
printf '%d passed, %d failed\n' "$((runs - failures))" "$failures"
((failures == 0))
