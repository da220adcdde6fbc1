#!/usr/bin/env bash
# Makes this folder anew: `results/run_all.sh`, or parts of it: `results/run_all.sh cartpole-pg point-pg`. Run folders go to
# runs/, and a command that was stopped goes on where it stopped. On one core: minutes to an hour each, LunarLander hours.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=" $* "

experiment() { # NAME FLAGS..
  local name=$1 file
  shift
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  echo "== $name: python run.py $*"
  python run.py "$@" --out "runs/$name" --resume
  mkdir -p "results/$name"
  for file in "runs/$name"/*/{report.md,summary.csv,curves.csv,curves.png,adaptation.png}; do
    cp "$file" "results/$name/"
  done
}

all="maml fomaml meta-sgd reptile directed-maml directed-fomaml directed-meta-sgd directed-reptile"
some="maml fomaml directed-maml directed-fomaml"
five="--seed 1 2 3 4 5"
ten="--seed 1 2 3 4 5 6 7 8 9 10"

experiment cartpole-pg --env cartpole --algo $all $five
experiment cartpole-ac --env cartpole --algo $all $five --rl ac
experiment control-beta --env cartpole --algo fomaml --beta 0.002 $five --epochs 120
experiment control-random --env cartpole --algo directed-fomaml --medium random $five --epochs 120
experiment control-step --env cartpole --algo fomaml directed-fomaml --baseline step $five --epochs 200
experiment cartpole-by-gymnasium --env CartPole-v1 --param gravity --range 5 15 --horizon 200 --threshold 175 \
  --algo fomaml $five --epochs 120
experiment meta-sgd-at-beta --env cartpole --algo meta-sgd directed-meta-sgd --beta-alpha 0.001 --estimator dice $five
experiment point-pg --env point --algo $all $ten
for estimator in naive lvc dice; do
  experiment estimators-$estimator --env point --algo maml directed-maml --estimator $estimator --beta 0.0003 \
    --delta 0.0015 --seed $(seq 1 20) --eval-every 25
done
experiment crossing-pg --env crossing --algo $some $five
experiment crossing-ac --env crossing --algo $some $five --rl ac
experiment velocity-pg --env velocity --algo $some $five
experiment lunarlander-pg --env lunarlander --algo maml directed-maml --estimator dice --seed 1 2 3 --eval-every 100
experiment lunarlander-step --env lunarlander --algo directed-maml --baseline step --estimator dice --seed 1 2 3 \
  --eval-every 100
python report.py README.md results/README.md
