#!/usr/bin/env bash
# Makes every result of this folder: `results/run_all.sh`, or some: `results/run_all.sh cartpole-pg controls/point`.
# `results/run_all.sh --list` prints the names of the experiments and runs nothing. Run folders go to runs/; an
# experiment that was stopped resumes where it stopped. On two cores all of them take about five hours, and LunarLander
# five more.
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
  [[ -z $list || $1 == "$found" ]] || echo "$1" # LunarLander's experiments take several commands
  found=$1
  [[ -z $list ]]
}

experiment() { # NAME FLAGS..
  local name=$1 file
  shift
  is_next "$name" || return 0
  echo "== $name: python run.py $*"
  python run.py "$@" --out "runs/$name" --resume
  mkdir -p "results/$name"
  for file in "runs/$name"/*/{report.md,summary.csv,curves.csv,curves.png,thresholds.png,adaptation.png}; do
    [[ $name != */* || $file == */summary.csv ]] || continue # part of a comparison: only its numbers
    cp "$file" "results/$name/"
  done
}

scaled() { # SCALE NUMBERS..
  LC_ALL=C awk 'BEGIN { for (i = 2; i < ARGC; i++) printf "%g ", ARGV[1] * ARGV[i] }' "$@"
}

all="maml fomaml meta-sgd reptile directed-maml directed-fomaml directed-meta-sgd directed-reptile"
five="maml fomaml meta-sgd reptile directed-maml"
both="--algo fomaml directed-fomaml"
directed="--algo directed-fomaml"
ten="--seed $(seq -s " " 10)"

# The main experiment, PROTOCOL.md
for family in point velocity cartpole crossing lunarlander; do
  if is_next protocol/$family; then python -m results.protocol $family; fi
done

# Fig. 2, Table I; on point and velocity with held-out tasks outside Φ too
experiment cartpole-pg --env cartpole --algo $all $ten
experiment crossing-pg --env crossing --algo $all $ten
experiment point-pg --env point --algo $all $ten --eval-range -1 1 -1 1
experiment velocity-pg --env velocity --algo $all $ten --eval-range -1 4
experiment cartpole-ac --env cartpole --algo $five $ten --rl ac --epochs 150
experiment crossing-ac --env crossing --algo $five $ten --rl ac --epochs 150

# Fig. 3, and the ablation of δ
experiment fig3 --env cartpole --algo fomaml directed-fomaml meta-sgd directed-meta-sgd --beta 0.02 $ten --epochs 200
experiment delta --env cartpole $directed --delta 0 0.0005 0.001 0.002 0.005 0.01 0.02 $ten --epochs 250

# Controls at Table I's step sizes: 2β without the δ-step; a random task as the medium task; as many trajectories without
# the δ-step; and another baseline
for env in "cartpole 0.002" "crossing 0.001" "point 0.002 --eval-range -1 1 -1 1" "velocity 0.0006 --eval-range -1 4"; do
  read -r env beta range <<< "$env"
  experiment controls/$env/beta --env $env --algo fomaml --beta $beta $ten $range
  experiment controls/$env/random --env $env $directed --medium random $ten $range
  experiment controls/$env/samples --env $env --algo fomaml --trajectories 11 $ten $range
done
experiment controls/cartpole/baseline --env cartpole $both --baseline step $ten

# Controls with tuned step sizes: 12 values of β against 15 pairs (β, δ), seeds 1 to 5; the best of each again on seeds 11 to 20
for env in "cartpole 1" "crossing 0.5" "point 1"; do
  read -r env scale <<< "$env"
  deltas=$(scaled $scale 0.0025 0.005 0.01)
  for beta in $(scaled $scale 0.0005 0.0007 0.001 0.0014 0.002 0.0028 0.004 0.0056 0.008 0.011 0.016 0.022); do
    experiment grid/$env/beta$beta --env $env --algo fomaml --beta $beta --seed 1 2 3 4 5 --epochs 150
  done
  for beta in $(scaled $scale 0.0005 0.001 0.002 0.004 0.008); do
    experiment grid/$env/directed-beta$beta --env $env $directed --beta $beta --delta $deltas --seed 1 2 3 4 5 \
      --epochs 150
  done
done
fresh="--seed $(seq -s " " 11 20) --epochs 150"
for env in "cartpole 0.0056 0.004 0.005" "crossing 0.004 0.004 0.005" "point 0.008 0.008 0.01"; do
  read -r env alone beta delta <<< "$env"
  experiment tuned/$env/undirected --env $env --algo fomaml --beta $alone $fresh
  experiment tuned/$env/directed --env $env $directed --beta $beta --delta $delta $fresh
done
if [[ -z $list ]] && is_wanted grid; then python -m results.steps; fi
if is_next directions; then python -m results.directions; fi

# Open questions: other task distributions and medium tasks; turbulence after convergence; a medium task at a corner of Φ
for env in cartpole crossing point; do
  for dist in bimodal skewed; do
    experiment task-dist/$env-$dist/mean --env $env $both --task-dist $dist $ten --epochs 150
    for medium in sampled median; do
      experiment task-dist/$env-$dist/$medium --env $env $directed --medium $medium --task-dist $dist $ten --epochs 150
    done
  done
done
for schedule in decay converged; do
  experiment schedule/$schedule --env cartpole $directed --delta-schedule $schedule $ten
done
experiment controls/point/corner --env point $directed --medium 0.5 0.5 $ten --eval-range -1 1 -1 1

# Estimators of the meta-gradient; Meta-SGD with α updated by β; CartPole through the gymnasium wrapper
for estimator in naive lvc dice; do
  experiment estimators/$estimator --env point --algo maml directed-maml --estimator $estimator --beta 0.0003 \
    --delta 0.0015 --seed $(seq 1 20) --eval-every 25
done
experiment meta-sgd-at-beta --env cartpole --algo meta-sgd --beta-alpha 0.001 --seed 1 2 3 4 5 --epochs 250
experiment cartpole-by-gymnasium --env CartPole-v1 --param gravity --range 5 15 --horizon 200 --threshold 175 \
  --algo fomaml --seed 1 2 3 4 5 --epochs 120

# iMAML, MAML++ and Sharp-MAML, with and without the δ-step, beside joint training and FOMAML; compare them by env steps:
# an epoch of MAML takes two batches a task, of iMAML and MAML++ three, of Sharp-MAML four
learners="fomaml maml++ imaml sharp-maml sharp-fomaml"
for env in "cartpole --epochs 120" crossing point; do
  name=${env%% *}
  experiment learners/$name/adapting --env $env --algo $learners $(printf "directed-%s " $learners) $ten
  experiment learners/$name/joint --env $env --algo fomaml directed-fomaml --inner-steps 0 $ten
done

# ProMP: five β-steps on the same trajectories against single ones, for MAML, Directed-MAML and joint training, each with
# the best of a grid of step sizes; on Pendulum Table I's δ is too large, so Directed-MAML has a second one
promp="--optimizer adam --baseline step"
pendulum="--env Pendulum-v1 --param g --range 5 15 --threshold -400 $promp"
lander="--env lunarlander --eval-every 100"
for steps in "1" "5 --clip 0.3"; do
  outer="--outer-steps $steps"
  grid="$outer --beta 0.003 0.01 0.03 0.1 --seed 1 2 --epochs 100"
  experiment promp/pendulum/grid-${steps%% *}/adapting $pendulum $grid --algo maml directed-maml
  experiment promp/pendulum/grid-${steps%% *}/delta $pendulum $outer --beta 0.003 0.01 0.03 --seed 1 2 --epochs 100 \
    --algo directed-maml --delta 0.001
  experiment promp/pendulum/grid-${steps%% *}/joint $pendulum $grid --algo maml --inner-steps 0
  grid="$outer --beta 0.003 0.01 0.03 --seed 1 --epochs 50"
  experiment promp/lunarlander/grid-${steps%% *}/adapting $lander $promp $grid --algo maml directed-maml
  experiment promp/lunarlander/grid-${steps%% *}/joint $lander $promp $grid --algo maml --inner-steps 0
done

promp_tuned() { # NAME N β β δ β FLAGS.. : with N outer steps, MAML at its β, Directed-MAML at β and δ, joint training at β
  local place=promp/$1/tuned-$2 maml=$3 directed=$4 delta=$5 joint=$6
  shift 6
  experiment $place/maml "$@" --algo maml --beta $maml
  experiment $place/directed "$@" --algo directed-maml --beta $directed --delta $delta
  experiment $place/joint "$@" --algo maml --inner-steps 0 --beta $joint
}
fresh="--seed 11-15 --epochs 100"
promp_tuned pendulum 1 0.01 0.01 0.001 0.01 $pendulum $fresh
promp_tuned pendulum 5 0.01 0.01 0.001 0.01 $pendulum $fresh --outer-steps 5 --clip 0.3
fresh="--seed 11-13 --epochs 50"
promp_tuned lunarlander 1 0.01 0.01 0.005 0.01 $lander $promp $fresh
promp_tuned lunarlander 5 0.003 0.01 0.005 0.01 $lander $promp $fresh --outer-steps 5 --clip 0.3

# LunarLander: a run of 500 epochs takes 20 minutes of a core
experiment lunarlander-pg $lander --algo maml directed-maml --estimator dice --seed 1 2 3 4 5
experiment lunarlander-pg $lander --algo fomaml meta-sgd --estimator dice --seed 1 2 3 4 5 --epochs 350
experiment lunarlander-pg $lander --algo reptile --estimator dice --seed 1 2 3 4 5 --epochs 100
experiment lunarlander-ac $lander --rl ac --algo maml fomaml meta-sgd directed-maml --seed 1 2 3 4 5 --epochs 150
experiment lunarlander-ac $lander --rl ac --algo reptile --seed 1 2 3 4 5 --epochs 100
experiment estimators/lunarlander-ac $lander --rl ac --algo maml directed-maml --estimator dice --seed 1 2 3 4 5 \
  --epochs 100
experiment lunarlander-step $lander --algo directed-maml --baseline step --estimator dice --seed 1 2 3
experiment controls/lunarlander/beta $lander --algo maml --beta 0.002 --estimator dice --seed 1 2 3
experiment controls/lunarlander/random $lander --algo directed-maml --medium random --estimator dice --seed 1 2 3 \
  --epochs 300
if [[ -z $found ]]; then
  echo "run_all.sh: unknown experiment ${wanted[*]}; --list prints the names" >&2
  exit 2
fi
[[ -n $list ]] || python -m results.fill README.md results/README.md
