#!/usr/bin/env bash
# The measurements of the first walk: trains and attacks on real pictures.
#
#   DATA=<folder with cluttered_mnist/ and imagenette/> experiments/first_walk.sh [part ...]
#
# Parts and their size on two CPU cores:
#   digits       2 models x 3 seeds on cluttered MNIST (10000 images, 10 epochs),
#                PGD-20 at three radii on the 1000 test images: about 30 minutes
#   photographs  multi_gaze with five ResNet-18 branches on Imagenette at 96
#                pixels (2850 images), PGD-20 on 200 test images: about 40 minutes
# Every step can be killed and goes on where it was when the script runs again;
# what is finished is not done twice. experiments/table.py prints the records;
# with --publish=walk it also copies them to results/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${DATA:?name the folder of the data sets with DATA=...}"
RUNS=${RUNS:-runs}
PYTHON=${PYTHON:-.venv/bin/python}

train() { # folder, then the flags
  local folder=$1 resume=
  shift
  [ -f "$folder/results.json" ] && return
  [ -f "$folder/state.npz" ] && resume=--resume
  [ -z "$resume" ] && [ -d "$folder" ] && resume=--overwrite
  "$PYTHON" trainer.py "$@" --data_dir="$DATA" --runs_dir="$RUNS" $resume
}

digits() {
  local seed model
  for seed in 0 1 2; do
    for model in multi_gaze parallel_transformers; do
      local folder=$RUNS/cluttered_mnist-$model-seed$seed
      train "$folder" --model=$model --dataset=cluttered_mnist \
        --epochs=10 --batch_size=64 --learning_rate=2e-3 --schedule=cosine \
        --augmentation=upright_digits --seed=$seed --tag=seed$seed
      "$PYTHON" adversary.py --run="$folder" --data_dir="$DATA" \
        --attack=pgd --norm=linf --epsilon=0.05,0.1,0.2 --steps=20 --seed=0
    done
  done
}

photographs() {
  local folder=$RUNS/imagenette-multi_gaze-size96
  train "$folder" --model=multi_gaze --dataset=imagenette --image_size=96 \
    --num_transformers=5 --backbone=resnet18 --width=32 \
    --localization_width=32 --epochs=14 --batch_size=32 --schedule=cosine \
    --learning_rate=1e-3 --augmentation=strong_photographs --seed=0 --tag=size96
  "$PYTHON" adversary.py --run="$folder" --data_dir="$DATA" --attack=pgd \
    --norm=linf --epsilon=1/255,2/255,4/255 --steps=20 --num_examples=200 \
    --seed=0
}

for part in "${@:-digits photographs}"; do
  for one in $part; do "$one"; done
done
