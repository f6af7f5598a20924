#!/usr/bin/env bash
# What several GPUs of one machine do together, in parts of at most ten minutes. With one card the same parts run with ranks
# and replicas that share it, over less: right, not fast.
#
#   tests/gpu/multi.sh [PART...]   all of: golden grid moves pairs distance nccl kill
#
# golden    golden cases with 2, 4 and 8 ranks, one a card where there are so many
# grid      `bench grid` on random:48b, all cards one replica: batch by context; with one card random:48b-e16, two ranks on it
# moves     streams that move between replicas on different cards, in float32: tests/gpu/moves.py
# pairs     the same by communicators of two (`--handoff pair`), and targets killed in the middle: tests/gpu/pairs.py
# distance  `bench migrate` in bf16, where digests hold the bits of states equal: bytes, stalls, the price of remote attention
# nccl      the same by communicators of two (`--handoff pair`)
# kill      a rank is killed, one is stopped, the others leave
#
# Replicas hand sessions to each other by CUDA's handles of memory, over NVLink where there is one; in `pairs` and `nccl` by communicators
# of NCCL between their ranks. PERIGEE_GPU_BIN, PERIGEE_GOLDEN and PYTHON as in tests/gpu/run; PERIGEE_CELLS are the cells of grid,
# PERIGEE_CONTEXTS the contexts of distance, PERIGEE_FILLED those whose latents are filled in rather than computed.
# What cannot run is reported as not run. Exit status 1 when something failed.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root" || exit 1
. tests/gpu/libraries.sh
export PYTHON=${PYTHON:-python3}
perigee=${PERIGEE_GPU_BIN:-target/release}/perigee
part_seconds=600 failed=0
# NVLink's multicast is off: not every machine grants it to a container. Where ranks are more than cards they share them.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} NCCL_MULTI_RANK_GPU_ENABLE=1

# Runs a command within a part's time under a title; keeps count of failures.
check() {
  local title=$1 status=0
  shift
  printf -- '--- %s\n$ %s\n' "$title" "$*"
  timeout "$part_seconds" "$@" || status=$?
  if ((status == 0)); then
    printf -- '--- %s: passed\n' "$title"
  else
    printf -- '--- %s: FAILED (exit status %d)\n' "$title" "$status"
    failed=$((failed + 1))
  fi
}

golden_cases() {
  printf '%s\n' tests/cases/tiny
  if [ -n "${PERIGEE_GOLDEN:-}" ]; then
    find "$PERIGEE_GOLDEN" -mindepth 1 -maxdepth 1 -type d | sort
  fi
}

part_golden() {
  local cases dtype ranks=2,4
  ((cards < 8)) || ranks=2,4,8
  mapfile -t cases < <(golden_cases)
  for dtype in fp32 bf16; do
    check "golden cases over $cards cards in $dtype" env PERIGEE="$perigee" tests/tools/golden_matrix.sh --ranks "$ranks" --recorded --limit 140 \
      --device "$all" --dtype "$dtype" "${cases[@]}"
  done
}

part_grid() {
  if ((cards > 1)); then
    check "grid of random:48b, $cards ranks" "$PYTHON" tests/gpu/grid.py "$perigee" random:48b "$all" "$cards" \
      "${PERIGEE_CELLS:-1x1024,8x1024,64x1024,256x1024,1x8192,64x8192,1x65536}" --state-slots 300
  else
    check 'grid of random:48b-e16, two ranks on one card' "$PYTHON" tests/gpu/grid.py "$perigee" random:48b-e16 "$all" 2 \
      "${PERIGEE_CELLS:-1x256}" --state-slots 8 --latent-pages 256 --max-model-len 4096
  fi
}

part_moves() {
  local case_dir
  for case_dir in $(golden_cases); do
    check "moved streams, ${case_dir##*/}" "$PYTHON" tests/gpu/moves.py "$perigee" "$case_dir" "$all"
  done
}

part_pairs() {
  local case_dir
  for case_dir in $(golden_cases); do
    check "states by pairs, ${case_dir##*/}" "$PYTHON" tests/gpu/pairs.py "$perigee" "$case_dir" "$all"
  done
}

part_distance() {
  local contexts=1024,8192,65536 filled=524288
  ((cards > 1)) || contexts=1024 filled=65536
  check 'price of distance, random:48b-e16' "$perigee" bench migrate --model random:48b-e16 --device "$all" \
    --context "${PERIGEE_CONTEXTS:-$contexts}" --filled "${PERIGEE_FILLED:-$filled}"
}

part_nccl() {
  local contexts=1024,8192,32768 filled=131072,524288
  ((cards > 1)) || contexts=1024 filled=65536
  check 'price of distance, random:48b-e16, states by pairs' env PERIGEE_UP_HANDOFF=pair "$perigee" bench migrate --model random:48b-e16 \
    --device "$all" --whole 0 --context "${PERIGEE_CONTEXTS:-$contexts}" --filled "${PERIGEE_FILLED:-$filled}"
}

part_kill() {
  check 'a served stream, a rank killed, a rank stopped' "$PYTHON" tests/gpu/ranks.py "$perigee" tests/cases/tiny "$all"
}

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L; then
  printf 'not run: no NVIDIA GPU on this machine\n'
  exit 0
fi
cards=$(nvidia-smi -L | wc -l)
printf '%s, %d cards\n' "$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)" "$cards"
# Devices of one replica over all cards, which replicas of one rank share out among them.
all=cuda:$(seq -s, 0 $((cards - 1)))
for part in "${@:-golden grid moves pairs distance nccl kill}"; do
  for name in $part; do
    "part_$name"
  done
done
printf '%d failed\n' "$failed"
((failed == 0))
