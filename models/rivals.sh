#!/bin/sh
# The rivals of models/README.md beside the shipped model, as Markdown on standard output. From the root of the tree, after
# train/runs/default.sh, train/runs/rivals.sh and cargo build --release.
set -e
R=${RIVALS:-runs-out}
set -- --arm nodes --arm "gist@$R/gist.gguf" --arm "full@$R/full.gguf" --arm "window@$R/full.gguf"
if [ -f "$R/ahn.gguf" ]; then set -- "$@" --arm "ahn@$R/ahn.gguf"; fi
./target/release/mneme eval run -m "${MODEL:-models/mneme-records.gguf}" -t "${THREADS:-2}" --seed 990001 --length 1k --facts 12 -n 48 \
    --task single,multi_key,update,multi_query,multi_value,tracking,aggregation --equal-bytes "$@" -o "$(mktemp)"
