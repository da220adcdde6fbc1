#!/usr/bin/env bash
# Makes every result of this folder: `results/run_all.sh`, or some: `results/run_all.sh cartpole-pg learners/point`.
# `results/run_all.sh --list` prints the names of the experiments and runs nothing. Run folders go to runs/; an
# experiment that was stopped resumes where it stopped. How long they take stands in README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
list=
if [[ ${1:-} == --list ]]; then list=yes; shift; fi
wanted=("${@:-}")
found= # the last experiment that was wanted

is_wanted() { # NAME
  local part
  for part in "${wanted[@]}"; do
    [[ $1/ == "${part:+$part/}"* ]] && return 0
  done
  return 1
}

is_next() { # NAME: whether to run this experiment now; with --list, print its name instead
  is_wanted "$1" || return 1
  [[ -z $list || $1 == "$found" ]] || echo "$1" # some experiments take several commands
  found=$1
  [[ -z $list ]]
}

experiment() { # NAME FLAGS..
  local name=$1
  shift
  is_next "$name" || return 0
  echo "== $name: python run.py $*"
  python run.py "$@" --out "runs/$name" --resume
  mkdir -p "results/$name"
  cp "runs/$name"/*/{summary.csv,curves.csv} "results/$name/"
}

# The main experiment, PROTOCOL.md
for family in point velocity cartpole crossing lunarlander cartpole-again point-maml velocity-maml; do
  if is_next protocol/$family; then python -m results.protocol $family; fi
done

# The paper's own: Table I's step sizes. Fig. 2
all="maml fomaml meta-sgd reptile directed-maml directed-fomaml directed-meta-sgd directed-reptile"
experiment cartpole-pg --env cartpole --algo $all --seed 1-10 --epochs 250
experiment crossing-pg --env crossing --algo $all --seed 1-10 --epochs 200
experiment cartpole-ac --env cartpole --algo $all --seed 1-10 --rl ac --epochs 200
experiment crossing-ac --env crossing --algo $all --seed 1-10 --rl ac --epochs 200
# Their control: β + δ / M without a δ-step
experiment larger-beta/cartpole --env cartpole --algo fomaml --beta 0.002 --seed 1-10 --epochs 250
experiment larger-beta/crossing --env crossing --algo fomaml --beta 0.001 --seed 1-10 --epochs 200
experiment larger-beta/cartpole-ac --env cartpole --algo fomaml --beta 0.002 --seed 1-10 --rl ac --epochs 200
experiment larger-beta/crossing-ac --env crossing --algo fomaml --beta 0.001 --seed 1-10 --rl ac --epochs 200
experiment larger-beta/lunarlander --env lunarlander --algo fomaml --beta 0.002 --seed 1-5 --epochs 350 --eval-every 100
# Fig. 3, the ablation of δ, Eq. 2 to the letter, and Table II
four="fomaml directed-fomaml meta-sgd directed-meta-sgd"
experiment fig3 --env cartpole --algo $four --beta 0.02 --seed 1-10 --epochs 200
experiment fig3-raw --env cartpole --algo $four --beta 0.02 --seed 1-10 --epochs 200 --advantages raw
experiment delta --env cartpole --algo directed-fomaml --delta 0 0.0005 0.001 0.002 0.005 0.01 0.02 --seed 1-10 \
  --epochs 250
experiment raw --env cartpole --algo maml directed-maml --seed 1-5 --epochs 200 --advantages raw
experiment lunarlander --env lunarlander --algo maml fomaml meta-sgd directed-maml --seed 1-5 --epochs 350 \
  --eval-every 100
experiment lunarlander-ac --env lunarlander --algo maml directed-maml --seed 1-5 --rl ac --epochs 350 --eval-every 100

# Exploratory. The learners beside the paper's, and joint training; compare them by env steps
learners="fomaml maml++ imaml sharp-maml sharp-fomaml"
for env in "cartpole --epochs 150" "crossing --epochs 150" point; do
  name=${env%% *}
  experiment learners/$name/adapting --env $env --algo $learners $(printf "directed-%s " $learners) --seed 1-10
  experiment learners/$name/joint --env $env --algo fomaml directed-fomaml --inner-steps 0 --seed 1-10
done
# Other distributions of tasks, with medium tasks that do not follow ρ or do
for env in cartpole crossing point; do
  for dist in bimodal skewed; do
    experiment task-dist/$env-$dist/mean --env $env --algo fomaml directed-fomaml --task-dist $dist --seed 1-10 \
      --epochs 150
    experiment task-dist/$env-$dist/sampled --env $env --algo directed-fomaml --medium sampled --task-dist $dist \
      --seed 1-10 --epochs 150
  done
done
# Turbulence after convergence: schedules of δ
for schedule in decay converged; do
  experiment schedule/$schedule --env cartpole --algo directed-fomaml --delta-schedule $schedule --seed 1-10 --epochs 250
done
# ProMP: five β-steps on the same trajectories against single ones, with and without the δ-step and adaptation
pendulum="--env Pendulum-v1 --param g --range 5 15 --threshold -400 --optimizer adam --baseline step --beta 0.01"
for steps in "1" "5 --clip 0.3"; do
  experiment promp/pendulum/${steps%% *}/adapting $pendulum --outer-steps $steps --algo maml directed-maml --delta 0.001 \
    --seed 1-5 --epochs 100
  experiment promp/pendulum/${steps%% *}/joint $pendulum --outer-steps $steps --algo maml --inner-steps 0 --seed 1-5 \
    --epochs 100
done
if is_next directions; then python -m results.directions; fi

if [[ -z $found ]]; then
  echo "run_all.sh: unknown experiment ${wanted[*]}; --list prints the names" >&2
  exit 2
fi
[[ -n $list ]] || python -m results.fill
