#!/bin/sh
# Every figure of models/README.md: sh models/eval.sh > report.md   (from the root of the tree, after cargo build --release)
# Texts come from seed 990001, which training never draws.
set -e
M=${MODEL:-models/mneme-records.gguf}
OUT=${OUT:-models/plots}
run() {
    echo "## mneme eval run $*"
    echo
    ./target/release/mneme eval run -m "$M" -t "${THREADS:-1}" --seed 990001 "$@" -o /dev/null
    echo
}
# One fact asked for, uneven density: learned cuts, and the same bytes spent otherwise.
run --task single --length 2k --facts 24 --n 128 --equal-bytes --plot "$OUT" \
    --arm nodes --arm nodes:decider=sentence --arm nodes:decider=stride --arm nodes:decider=random --arm window --arm full
# The other tasks, learned cuts.
run --task multi_key,update,multi_query,multi_value,tracking,aggregation --length 1k --facts 12 --n 64 --arm nodes
# tau as a dial.
run --task single --length 1k --facts 16 --n 48 --arm nodes --sweep tau=0.05,0.2,0.5,0.8,0.95
# Tokens per node held at a target.
run --task single --length 4k --facts 64 --n 12 --arm nodes:target_rate=12 --arm nodes:target_rate=20 --arm nodes:target_rate=32
# Length: about that of training, and 16 times that.
run --task single --length 512,1k,2k,4k,8k,16k --facts 8 --n 24 --arm nodes --plot "$OUT"
