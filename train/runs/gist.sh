#!/bin/sh
# Trains gist.toml from scratch; run from the repository root. Stops and goes on where it stopped.
set -e
python train/train.py compressor train/runs/gist.toml
