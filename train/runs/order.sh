#!/bin/sh
# Roles, then order.toml, from the model of default.sh; run from the repository root.
set -e
python train/roles.py runs-out/default/joint/export runs-out/order/roles
python train/train.py compressor train/runs/order.toml
python train/evaluate.py runs-out/order/compressor/export --task tracking --facts 12 --filler 4 --arms facts,learned
