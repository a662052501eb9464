#!/usr/bin/env bash
# What wants a GPU, the most telling first. Each part has a limit of its own: one that hangs takes no time from the others.
#
#   bash benchmarks/gpu/all.sh OUT PROMPTS.jsonl [PART ...]      PARTs: tests speed batches steps heads; all without
#
# PROMPTS are measured with. `heads` trains on the answers to others, TRAIN_PROMPTS=FILE, a record of `messages` a line.
# OUT gets a log of each part, pages of figures, heads, and parts.txt: how each part ended, after how many seconds. SCALE=2 doubles
# every limit, PYTEST_ARGS="-n 14" spreads the tests. DEVICE=cpu takes small sizes, to see that the
# commands run, without what is for GPUs alone.
set -uo pipefail
if (($# < 2)) || [[ ! -s $2 ]]; then
  echo "usage: bash benchmarks/gpu/all.sh OUT PROMPTS.jsonl [tests|speed|batches|steps|heads ...]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(realpath "$1") prompts=$(realpath "$2") device=${DEVICE:-cuda} scale=${SCALE:-1}
shift 2
parts=("$@")
((${#parts[@]})) || parts=(tests speed batches steps ${TRAIN_PROMPTS:+heads})
for part in "${parts[@]}"; do
  [[ " tests speed batches steps heads " == *" $part "* ]] || { echo "no part $part: tests, speed, batches, steps or heads" >&2; exit 2; }
done
if [[ " ${parts[*]} " == *" heads "* ]]; then
  [[ -s ${TRAIN_PROMPTS:-} ]] || { echo "heads: TRAIN_PROMPTS must name a file of prompts to train with" >&2; exit 2; }
  TRAIN_PROMPTS=$(realpath "$TRAIN_PROMPTS")
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
failed=0

# within SECONDS NAME COMMAND...: run it, its output in OUT/NAME.log.
within() {
  local name=$2 begin=$SECONDS limit status
  limit=$(awk "BEGIN { print $1 * $scale }")
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  ((status == 0)) || failed=1
  case $status in
    0) echo "$name: done after $((SECONDS - begin)) s" ;;
    124 | 137) echo "$name: stopped at its limit of $limit s" ;;
    *) echo "$name: failed with $status after $((SECONDS - begin)) s: $(tail -n 1 "$out/$name.log")" ;;
  esac | tee -a "$out/parts.txt"
}

if [[ $device == cuda ]]; then
  some=(--limit 16 --max-tokens 128 --repeats 2) costs=(--nodes 1 --nodes 16 --nodes 64)
  answer=(--batch 1024 --own-share 0 --minutes 2) heads=(--minutes 1.5)
else
  some=(--limit 1 --max-tokens 6 --repeats 1 --policy-s 0.1)
  costs=(--nodes 1 --nodes 4 --shapes tiny --dtype float32 --context 32 --copy-mib 8 --repeats 2)
  answer=(--batch 2 --own-share 0 --minutes 0.3 --max-tokens 8) heads=(--minutes 0.1 --tokens-a-step 64 --tokens-at-once 64)
fi
speed=(-m benchmarks.gpu.speed_default --device "$device" --prompts "$prompts" --output "$out" "${some[@]}")
train=(-m benchmarks.gpu.train_default)

for part in "${parts[@]}"; do
  case $part in
    tests)
      within 240 tests "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider ${PYTEST_ARGS:-}
      ;;
    speed)
      within 100 speed "$python" "${speed[@]}" --batch 1 --tree 16 --tree 64 --tree dynamic:64
      [[ $device != cuda ]] || within 100 speed-fused "$python" "${speed[@]}" --batch 1 --tree 16 --tree 64 --tree dynamic:64 --kernel fused
      ;;
    batches)
      within 120 batches "$python" "${speed[@]}" --batch 16 --batch 64 --tree 16 --tree 64
      [[ $device != cuda ]] || within 120 batches-fused "$python" "${speed[@]}" --batch 16 --batch 64 --tree 16 --tree 64 --kernel fused
      ;;
    steps)
      within 150 steps "$python" -m benchmarks.gpu.step_cost --device "$device" --batch 1 "${costs[@]}" --output "$out"
      ;;
    heads)
      within 200 answer "$python" "${train[@]}" answer --device "$device" --prompts "$TRAIN_PROMPTS" --out "$out/answers" "${answer[@]}"
      within 150 medusa1 "$python" "${train[@]}" train --device "$device" --data "$out/answers" --out "$out/medusa1" --kind hydra \
        --start-from default "${heads[@]}"
      within 150 medusa2 "$python" "${train[@]}" train --device "$device" --data "$out/answers" --out "$out/medusa2" --rank 8 \
        --lambda0 0.02 --start-from "$out/medusa1" "${heads[@]}"
      ;;
  esac
done
exit "$failed"
