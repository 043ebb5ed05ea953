#!/bin/sh
# Contexts as embeddings beside the same decoder reading them whole, and beside nodes: the scores of models/README.md,
# "Contexts". From the repository root, with the release binary built.
set -eu
exec target/release/mneme eval run -m models/mneme-records.gguf --memory-adapter models/mneme-records-concepts.gguf \
    --task single,multi_key,update,multi_query,multi_value,tracking --length 256,1024,2048 -n 64 -s 990001 \
    --arm concepts --arm full --arm nodes --concept-cache none "$@"
