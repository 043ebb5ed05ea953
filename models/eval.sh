#!/bin/sh
# Every figure of models/README.md, as Markdown on standard output. From the root of the tree, after cargo build --release:
#     sh models/eval.sh > scores.md
# Texts come from a seed that training never draws.
set -e
M=${MODEL:-models/mneme-records.gguf}
PLOTS=${PLOTS:-models/plots}
run() {
    printf '\n### `mneme eval run %s`\n\n' "$*"
    ./target/release/mneme eval run -m "$M" -t "${THREADS:-2}" --seed 990001 "$@" -o "$(mktemp)"
}
# The same bytes spent on learned cuts, on others, and on a window; text of uneven density.
run --task single --length 2k --facts 56 --questions 8 -n 64 --equal-bytes --plot "$PLOTS" \
    --arm nodes --arm nodes:decider=sentence --arm nodes:decider=stride --arm nodes:decider=random --arm window
# All tasks with learned cuts.
run --task single,multi_key,update,multi_query,multi_value,tracking,aggregation --length 1k --facts 12 -n 48 --arm nodes
# The whole list in its order, where several values are asked for.
run --task multi_query,multi_value --score exact --length 1k --facts 12 -n 48 --arm nodes
# Chinese.
run --task single,update,multi_query --lang zh --length 512 --facts 12 -n 24 --arm nodes --arm nodes:decider=sentence
# tau as a dial.
run --task single --length 1k --facts 24 --questions 8 -n 24 --arm nodes \
    --sweep tau=0.0001,0.0003,0.001,0.003,0.01,0.05,0.2,0.5,0.8,0.95,0.98,0.99,0.995
# Tokens per node held at a target.
run --task single --length 4k --facts 64 --questions 8 -n 8 \
    --arm nodes:target_rate=16 --arm nodes:target_rate=32 --arm nodes:target_rate=48
# Length.
run --task single --length 512,1k,1300,2k,4k,8k,16k,20800,32k --facts 24 --questions 8 -n 16 --plot "$PLOTS/length" --arm nodes --arm nodes:top_k=32
