#!/bin/sh
# Trains the rivals of the model of default.sh (full.toml, gist.toml, then ahn.toml on the former); run from the
# repository root. Stops and goes on where it stopped.
set -e
for arm in full gist ahn; do
    python train/train.py compressor train/runs/$arm.toml
    window=""
    if [ $arm = ahn ]; then window="--window 64 --sinks 4"; fi # as it was trained; converted files get the published sizes otherwise
    mneme convert runs-out/$arm/compressor/export -o runs-out/$arm.gguf --outtype f16 $window
done
