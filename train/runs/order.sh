#!/bin/sh
# Roles, then order.toml and long.toml, from the model of default.sh; run from the repository root.
set -e
python train/roles.py runs-out/default/joint/export runs-out/order/roles
torchrun --nproc-per-node 2 train/train.py compressor train/runs/order.toml
torchrun --nproc-per-node 2 train/train.py compressor train/runs/long.toml
python train/evaluate.py runs-out/order/long/export --task tracking --facts 12 --filler 40 --questions 6 --documents 16 --arms facts,learned
