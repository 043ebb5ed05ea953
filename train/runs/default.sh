#!/bin/sh
# Trains the shipped model from scratch: default.toml's two stages, then chinese.toml; run from the repository root. Stops and
# goes on where it stopped.
set -e
python train/train.py compressor train/runs/default.toml
python train/train.py joint train/runs/default.toml
python train/train.py joint train/runs/chinese.toml
python train/evaluate.py runs-out/default/chinese/export --facts 12 --filler 12 --documents 128 --questions 4
