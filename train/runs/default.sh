#!/bin/sh
# Trains default.toml from scratch; run from the repository root. Stops and goes on where it stopped.
set -e
python train/train.py compressor train/runs/default.toml
python train/train.py joint train/runs/default.toml
python train/evaluate.py runs-out/default/joint/export --facts 12 --filler 12 --documents 128 --questions 4
