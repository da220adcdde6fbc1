"""Train, evaluate and report: `python run.py --env cartpole --algo directed-fomaml --seed 1`; all flags: `--help`.

Runs of one algorithm, seeds × step sizes, are one batched program along the first axis S; several processes share them
out. Read `main` first, then `train` and `train_epoch`, which is Algorithm 1; Eq. 2b is in maml.py, the δ-step in
directed.py.
"""

import contextlib
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections import defaultdict
from functools import partial

# Read when numpy loads. Rollouts are small products, the cores have runs or workers of their own, and --threads is
# torch's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Read by torch's MKL: its products have the same bits wherever in memory, so in whatever batch, a matrix is.
os.environ.setdefault("MKL_CBWR", "AUTO")

import gymnasium
import numpy
import torch
from tqdm import tqdm

import envs
import learners
import maml
import measures
import parallel
import policies
import report
from directed import directed
from harness import checkpoints, watch
from harness.checkpoints import Run, RunError
from settings import (
    ALL_SETTINGS,
    LEARNED_ALPHA,
    check_memory,
    default_of,
    folder_of_all,
    make_env,
    parse,
    plan,
    with_family_defaults,
)

NOTHING = contextlib.nullcontext()
INIT, TASKS, MEDIUM, EVALUATION = range(4)  # the purposes that random numbers are drawn for: see envs.generators
BASES = maml.META_LEARNERS | {"imaml": learners.imaml}  # to which sharp- and directed- are put
CHECKPOINT_SECONDS = 20  # the most training time that a crash can cost


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with one_clear_line() as ranks:
        args = parse(argv)
        if args.watch is not None:
            return print(watch.watch(args.watch, args.phi, args.env))
        check_ranks(args, ranks)
        torch.set_num_threads(1)  # until training: a process forked from one that has used several threads hangs
        env = make_env(args)
        args = with_family_defaults(args, env)
        check_memory(args, env, choose_device(args, env))
        runs = new_runs(args, env)
        failures, stopped = train_all(runs, env, args, ranks)
        ranks.object_from_first(lambda: finish(failures, args))
        if stopped:
            line = [word for word in argv if word not in ("--resume", "--overwrite")]
            start = "python" if ranks.count == 1 else "torchrun .."
            ranks.leave()
            raise RunError(f"stopped; continue with: {start} run.py {shlex.join(line)} --resume", 128 + stopped[0])
        if failures:
            raise SystemExit(1)


# --- train ---


def train_all(runs, env, args, ranks):
    """Train all runs, in several processes where there are as many runs and cores, each with a share of the runs.

    Returns a line for each run that failed, and the signals that stopped the training, if any.
    """
    device = choose_device(args, env)
    parallel.keep_memory()
    with (
        checkpoints.opened(runs, args.resume, args.overwrite, args.epochs) if ranks.rank == 0 else NOTHING,
        parallel.caught_signals() as signals,
        Progress(runs, args, ranks) as progress,
    ):
        states = ranks.object_from_first(lambda: [run.state for run in runs])
        for run, state in zip(runs, states, strict=True):
            run.state = state
        workers = min(args.workers, parallel.most_processes())
        processes = 1 if device == "cuda" or ranks.count > 1 else max(min(workers, len(runs)), 1)
        trajectories = runs[0].settings["tasks"] * runs[0].settings["trajectories"]
        samplers = min(workers // processes, trajectories)  # for each that trains, if gymnasium's environments
        work = partial(train_together, args=args, env=env, device=device, samplers=samplers, ranks=ranks)
        failures = parallel.run_jobs(work, share_out(runs, processes), processes, progress.update, signals)
    return failures, signals


def choose_device(args, env):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: no CUDA device is available to torch; use --device cpu", 2)
    if args.device == "auto":
        return "cuda" if torch.cuda.is_available() and not env.is_gymnasium else "cpu"
    return args.device


def share_out(runs, processes):
    """The runs as jobs for so many processes. A job is one batch: runs of one algorithm at the same epoch."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.settings["algo"], run.state["epoch"]].append(run)
    parts = processes // math.gcd(processes, len(groups))  # the fewest that give all processes equally many jobs
    return [group[i::parts] for group in groups.values() for i in range(min(parts, len(group)))]


def train_together(runs, tell, args, env, device, samplers, ranks):
    """Train runs as one batch to the command's epochs. Returns a line for each run that failed.

    tell: a function of what there is to say of an epoch; returns the signals that ask to stop after it.
    """
    torch.set_num_threads(args.threads)
    head = policies.make_head(env.actions)
    for run in runs if ranks.rank == 0 else ():
        begin(run, args, env, device, len(runs))
    with parallel.open_sampler(env, head, device, samplers if samplers > 1 else 0) as sample:
        return train(Batch(runs, env, head, sample, device, ranks), args.epochs, args.eval_every, tell)


def train(batch, epochs, eval_every, tell):
    """Train a batch to `epochs`, evaluating and saving it on the way; see `train_together`."""
    failures, stopping, saved = [], [], time.perf_counter()
    while batch and batch.epoch < epochs and not stopping:
        start = time.perf_counter()
        losses = train_epoch(batch)
        finite = log_epoch(batch, losses, time.perf_counter() - start)
        stopping = batch.ranks.any(tell(batch.news()))
        if not all(finite):
            failures += [fail(batch, run) for run, good in zip(batch.runs, finite, strict=True) if not good]
            batch = batch.only(finite)
        if batch and (batch.epoch % eval_every == 0 or batch.epoch == epochs):
            evaluate(batch)
        if batch and (stopping or batch.epoch == epochs or time.perf_counter() - saved > CHECKPOINT_SECONDS):
            batch.save()
            saved = time.perf_counter()
    return failures


def train_epoch(batch):
    """One epoch of Algorithm 1, for all runs of the batch at once. Returns the losses, which know what was sampled."""
    num_tasks, medium = batch.settings["tasks"], batch.settings["medium"]
    rng, medium_rng = (envs.generators(batch.seeds, purpose, batch.epoch) for purpose in (TASKS, MEDIUM))
    phi = envs.sample_tasks(batch.env, rng, num_tasks)  # line 6: φ ~ ρ, (S, M, P)
    replayed = batch.settings["outer_steps"] > 1
    losses = [(ReplayedLoss if replayed else TaskLoss)(batch, phi, rng, batch.ranks.tasks)]
    if medium is not None:
        phi_med = envs.medium_task(batch.env, medium, phi, medium_rng)  # line 1: (S, 1, P)
        losses.insert(0, TaskLoss(batch, phi_med, medium_rng, pooled=medium == "pooled"))
        batch.delta.copy_(scheduled_delta(batch))
    start = batch.position()
    # lines 4, 5: the δ-step, directed.py; 7 to 11: the inner steps and the meta-gradient, maml.py
    adapted = batch.meta_learner(batch.theta, *losses, batch.alpha, num_tasks, **batch.switches())
    between = batch.position()  # after the δ-step alone
    batch.optimizer.step()  # line 12: the β-step
    for _ in range(1, batch.settings["outer_steps"]):  # ProMP: more of them on the same trajectories
        # without the δ-step: it is a plain step, whose data are those of θ before it, and no ratio holds it back
        losses[-1].replay()
        batch.undirected(batch.theta, losses[-1], batch.alpha, num_tasks, **batch.switches())
        batch.optimizer.step()
    batch.moves = between - start, batch.position() - between
    batch.epoch += 1
    losses[-1].unmeasured = adapted
    return losses


class TaskLoss:
    """task_loss(params) -> (S, M): K fresh trajectories of each task φ (S, M, P) under params, and the loss on them.
    pooled: (S, 1), K trajectories in all, K / M of each, as one task whose φ differs from episode to episode.

    Of the M tasks it takes its `own` alone, with the noise that they have in any company. Keeps the mean undiscounted
    return (S, M) of every call, and sums up env steps (S,) and seconds of sampling; finite: every loss of a run was
    (S,).
    """

    def __init__(self, batch, phi, generators, own=slice(None), pooled=False):
        self.env, self.sample, self.phi, self.own = batch.env, batch.sample, phi, own
        self.generators = envs.on_device(generators, "cpu" if batch.env.is_gymnasium else batch.device)
        self.num_trajectories, self.pooled = batch.settings["trajectories"] // (phi.shape[1] if pooled else 1), pooled
        options = {key: batch.settings[key] for key in policies.OPTIONS}
        self.loss = partial(policies.LOSSES[batch.settings["rl"]], head=batch.head, **options)
        self.returns, self.env_steps, self.seconds, self.finite = [], 0, 0.0, True
        self.unmeasured = None  # parameters whose return is still to be logged, at no cost to the training

    def __call__(self, params):
        start = time.perf_counter()
        trajectories = self.draw(params)
        self.env_steps = self.env_steps + trajectories["mask"].sum((1, 2, 3)).cpu()
        self.seconds += time.perf_counter() - start
        return self.loss_on(trajectories, params)

    def draw(self, params):
        """Fresh trajectories, whose returns are kept; their env steps and seconds are for the caller to count."""
        noise = envs.draw_noise(self.env, self.generators, self.phi.shape[1], self.num_trajectories)
        noise = {key: x[:, self.own] for key, x in noise.items()}
        policy = maml.expand(params, self.phi.shape[1]) if self.pooled else params
        trajectories = self.sample(policy, self.phi[:, self.own], noise)
        if self.pooled:
            trajectories = {key: x.flatten(1, 2).unsqueeze(1) for key, x in trajectories.items()}  # (S, 1, K, ...)
        self.returns.append(trajectories["rewards"].sum(3).mean(2))
        return trajectories

    def loss_on(self, trajectories, params, **options):
        loss = self.loss(params, trajectories, **options)
        self.finite = self.finite & loss.detach().isfinite().all(1)
        return loss


class ReplayedLoss(TaskLoss):
    """A TaskLoss that keeps what it draws. After `replay` the n-th call gets the loss on what the n-th call drew, by
    likelihood ratios, clipped in query batches alone: inner steps are those of `maml.adapt`, whatever the ratio."""

    def __init__(self, batch, phi, generators, own):
        super().__init__(batch, phi, generators, own)
        options = {key: batch.settings[key] for key in policies.OPTIONS if key != "estimator"}
        self.as_drawn = partial(policies.as_drawn, head=batch.head, rl=batch.settings["rl"], **options)
        self.head, self.clip, self.period = batch.head, batch.settings["clip"], batch.calls
        self.drawn, self.replays = [], None

    def replay(self):
        """Begin an outer step on what was drawn in the first."""
        self.replays = iter(enumerate(self.drawn, 1))

    def __call__(self, params):
        if self.replays is None:
            return super().__call__(params)
        call, trajectories = next(self.replays)
        return self.loss_on(trajectories, params, clip=self.clip if call % self.period == 0 else None)

    def loss_on(self, trajectories, params, **options):
        if self.replays is None:
            self.drawn.append(self.as_drawn(params, trajectories))
        return super().loss_on(trajectories, params, **options)

    def kl(self, theta):
        """KL(π_old ‖ π_θ) of the policy before adaptation: (S, M)."""
        before, *_ = self.drawn
        return policies.kl(maml.expand(theta, before["mask"].shape[1]), before, self.head)


def penalised(meta_learner, eta):
    """Add η Σᵢ ∇KL(π_old ‖ π_θ), of the policy before adaptation, to the meta-gradient of replayed trajectories
    (Rothfuss et al. 2019). When they are drawn it is 0."""

    def penalised_meta_learner(theta, task_loss, *args, **kwargs):
        returned = meta_learner(theta, task_loss, *args, **kwargs)
        if task_loss.replays is not None:
            penalty = eta * task_loss.kl(theta).sum()
            gradients = torch.autograd.grad(penalty, list(theta.values()), materialize_grads=True)  # 0 of the critic
            for p, gradient in zip(theta.values(), gradients, strict=True):
                p.grad += gradient
        return returned

    return penalised_meta_learner


def scheduled_delta(batch):
    """δ of each run at this epoch: (S,)."""
    deltas = torch.tensor([run.settings["delta"] for run in batch.runs], dtype=torch.float64)
    if batch.settings["delta_schedule"] == "decay":
        return deltas / (1 + batch.epoch / 100)
    return deltas * torch.tensor([not run.state["totals"]["converged"] for run in batch.runs])


def log_epoch(batch, losses, seconds):
    """Add the epoch to every run's totals and log; returns for each run whether its losses and parameters are
    finite."""
    *_, task_loss = losses
    if task_loss.unmeasured is not None:
        # Reptile trains on no batch under θ', so its return there, as the other learners log it, takes trajectories of
        # its own. They are no training: neither env steps nor seconds count them (one rollout beside five).
        task_loss.draw(task_loss.unmeasured)
    steps_of = (0, batch.settings["inner_steps"])  # at θ, and after its inner steps; Sharp-MAML goes on elsewhere
    pre, post = (task_loss.returns[i].double().sum(1).cpu() / batch.settings["tasks"] for i in steps_of)  # (S,) each
    steps, broken = task_loss.env_steps.double(), (~task_loss.finite).double().cpu()
    batch.ranks.sum([pre, post, steps, broken])  # a rank knows its own tasks' alone, but the whole medium task
    steps = steps + sum(loss.env_steps for loss in losses[:-1])
    med = losses[0].returns[0].mean(1).tolist() if len(losses) > 1 else [None] * len(batch.runs)
    norms, kl = step_norms(batch), mean_kl(batch, task_loss)
    share = 1 / len(batch.runs)  # runs of a batch share its time evenly
    for i, run in enumerate(batch.runs):
        totals, threshold = run.state["totals"], run.settings["threshold"]
        totals["env_steps"] += int(steps[i])
        totals["seconds"] += share * seconds
        totals["sample_seconds"] += share * sum(loss.seconds for loss in losses)
        totals["smoothed"] = measures.smoothed(totals["smoothed"], float(post[i]))
        totals["converged"] |= threshold is not None and totals["smoothed"] > threshold
        times = [totals[key] for key in ("env_steps", "seconds", "sample_seconds")]
        run.state["epoch"] = batch.epoch
        batch.write(run, "log", [[batch.epoch, *times, float(pre[i]), float(post[i]), med[i], *norms[i], kl[i]]])
    finite = [p.detach().isfinite().flatten(1).all(1).cpu() for p in batch.learned]
    finite += [broken == 0, *(loss.finite.cpu() for loss in losses[:-1])]
    return torch.stack(finite).all(0).tolist()


def step_norms(batch):
    """How far the δ-step and the β-step moved θ, and the cosine between the two: three numbers for each run, None for
    what there is not."""
    moves = [move.double() for move in batch.moves]
    delta, beta = ((move * move).sum(1).sqrt().tolist() for move in moves)
    product = (moves[0] * moves[1]).sum(1).tolist()
    if batch.settings["medium"] is None:
        return [[None, b, None] for b in beta]
    return [[d, b, p / (d * b) if d * b else None] for d, b, p in zip(delta, beta, product, strict=True)]


def mean_kl(batch, task_loss):
    """KL(π_old ‖ π_θ) of the policy before adaptation after all outer steps, of each run; None where there was one."""
    if not isinstance(task_loss, ReplayedLoss):
        return [None] * len(batch.runs)
    with torch.no_grad():
        kl = task_loss.kl(batch.theta).double().sum(1).cpu() / batch.settings["tasks"]
    batch.ranks.sum([kl])
    return kl.tolist()


def evaluate(batch):
    """Returns on the held-out grid (G, P) after 0, 1, .. eval_steps inner steps, as rows of every run's eval.csv."""
    num_steps, ranks = batch.settings["eval_steps"], batch.ranks
    grid = envs.held_out_tasks(batch.env, batch.settings["eval_range"], batch.settings["eval_values"])
    rng = envs.generators(batch.seeds, EVALUATION, batch.epoch)
    task_loss = TaskLoss(batch, grid.expand(len(batch.runs), *grid.shape), rng, ranks.tasks)
    returns = torch.zeros(len(batch.runs), len(grid), num_steps + 1, dtype=torch.float64)
    own = returns[:, ranks.tasks]  # a view: (S, this rank's share of G, steps + 1)
    if own.numel():
        theta = maml.expand(batch.theta, own.shape[1])
        objective = task_loss if batch.lambda_ is None else learners.proximal(task_loss, theta, batch.lambda_)
        adapted = maml.adapt(theta, objective, batch.eval_alpha, num_steps, second_order=False)
        task_loss({name: p.detach() for name, p in adapted.items()})  # the returns after the last step
        own.copy_(torch.stack(task_loss.returns, 2))
    ranks.sum([returns])
    names = [" ".join(f"{x:g}" for x in phi) for phi in grid.tolist()]
    for run, by_task in zip(batch.runs, returns.tolist(), strict=True):
        rows = [
            [batch.epoch, name, step, x] for name, xs in zip(names, by_task, strict=True) for step, x in enumerate(xs)
        ]
        batch.write(run, "eval", rows)


def fail(batch, run):
    """Mark a run as failed; returns the line that says so."""
    line = f"{run.folder}: a loss or parameter is not finite after epoch {batch.epoch}; "
    line += "try a smaller --beta, --alpha or --delta"
    if batch.ranks.rank == 0:
        checkpoints.write_atomically(run.folder / checkpoints.FAILED, line + "\n")
    return line


# --- a batch of runs ---


class Batch:
    """S runs of one algorithm at the same epoch, trained as one program. Leaves of theta and alpha are (S, 1, ...)."""

    def __init__(self, runs, env, head, sample, device, ranks):
        self.runs, self.settings, self.epoch = runs, runs[0].settings, runs[0].state["epoch"]
        self.env, self.head, self.sample, self.device, self.ranks = env, head, sample, device, ranks
        self.seeds = [run.settings["seed"] for run in runs]
        stacked = checkpoints.stack([{key: run.state[key] for key in checkpoints.TENSORS} for run in runs], device)
        self.theta = {name: p.requires_grad_() for name, p in stacked["theta"].items()}
        learned_alpha = {name: p.requires_grad_() for name, p in stacked["alpha"].items()}
        sizes = {
            name: torch.tensor([run.settings[name] or 0.0 for run in runs], dtype=torch.float64, device=device)
            for name in ("alpha", "beta", "beta_alpha", "eval_alpha", "lambda_")
        }
        self.lambda_ = None if self.settings["lambda_"] is None else sizes["lambda_"][:, None]
        self.alpha = learned_alpha or sizes["alpha"][:, None]  # (S, 1), or (S, 1, ...) each
        self.eval_alpha = (
            learned_alpha or torch.where(sizes["eval_alpha"] > 0, sizes["eval_alpha"], sizes["alpha"])[:, None]
        )
        self.learned = [*self.theta.values(), *learned_alpha.values()]
        step_sizes = [sizes["beta"]] * len(self.theta) + [sizes["beta_alpha"]] * len(learned_alpha)
        self.optimizer = OPTIMIZERS[self.settings["optimizer"]](self.learned, step_sizes)
        for i, tensors in stacked["optimizer"].items():
            self.optimizer.state[self.learned[i]].update(tensors)
        self.calls = self.settings["inner_steps"] + 1 + self.settings["algo"].endswith("imaml")  # up to a query's
        self.meta_learner = self.undirected = self.make_meta_learner()
        if self.settings["delta"] is not None:
            self.delta = torch.zeros(len(runs), dtype=torch.float64)  # set before every epoch
            self.meta_learner = directed(self.undirected, self.delta)

    def make_meta_learner(self):
        """The one that --algo names, without the δ-step."""
        settings, base = self.settings, self.settings["algo"].removeprefix("directed-")
        meta_learner = partial(BASES[base.removeprefix("sharp-")], inner_steps=settings["inner_steps"])
        if base == "imaml":
            meta_learner = partial(meta_learner, lambda_=self.lambda_, cg_steps=settings["cg_steps"])
        if settings["kl_penalty"]:
            meta_learner = penalised(meta_learner, settings["kl_penalty"])
        meta_learner = self.ranks.share(meta_learner, self.learned, average=base == "reptile")
        return learners.sharp(meta_learner, settings["rho"]) if base.startswith("sharp-") else meta_learner

    def switches(self):
        """What the meta-learner takes besides, in this epoch: MAML++'s order and weights of the inner steps."""
        settings = self.settings
        if settings["first_order_epochs"] is None:
            return {}
        weights = maml.multi_step_weights(settings["inner_steps"], self.epoch, settings["multi_step_epochs"])
        return {"second_order": self.epoch >= settings["first_order_epochs"], "step_weights": weights}

    def only(self, kept):
        """The batch of those runs alone for which `kept` holds; None where there are none."""
        self.update_states()
        runs = [run for run, keep in zip(self.runs, kept, strict=True) if keep]
        return Batch(runs, self.env, self.head, self.sample, self.device, self.ranks) if runs else None

    def position(self):
        """All of θ, a vector for each run: (S, N)."""
        return torch.cat([p.detach().flatten(1) for p in self.theta.values()], 1)

    def update_states(self):
        state = self.optimizer.state
        optimizer = {i: dict(state[p]) for i, p in enumerate(self.learned) if p in state}
        alpha = self.alpha if isinstance(self.alpha, dict) else {}
        for i, run in enumerate(self.runs):
            run.state |= checkpoints.take({"theta": self.theta, "alpha": alpha, "optimizer": optimizer}, i)

    def save(self):
        if self.ranks.rank == 0:
            self.update_states()
            checkpoints.save(self.runs)

    def news(self):
        """What there is to say of the last epoch: algorithm, number of runs, mean return after adaptation."""
        returns = [run.state["log"][-1][5] for run in self.runs]
        return self.settings["algo"], len(returns), sum(returns) / len(returns)

    def write(self, run, table, rows):
        run.state[table] += rows
        if self.ranks.rank == 0:
            checkpoints.append_rows(run, table, rows)


def new_runs(args, env):
    """All runs of a command, at their first state."""
    planned = [pair for algo in args.algo for pair in plan(args, algo, env)]
    return [Run(folder, settings, first_state(settings, env)) for folder, settings in planned]


def first_state(settings, env):
    """Where a run begins: the same θ for every algorithm with the same seed."""
    rng = envs.generators([settings["seed"]], INIT)
    theta = policies.init(
        env.obs_dim, policies.make_head(env.actions), rng, settings["hidden"], critic=settings["rl"] == "ac"
    )
    alpha = {}
    if settings["algo"].endswith(LEARNED_ALPHA):
        steps = settings["inner_steps"] if settings["algo"].endswith("maml++") else None
        alpha = maml.learned_alpha(theta, settings["alpha"], steps)
    optimizer = {}
    if settings["optimizer"] == "adam":
        zeros = [torch.zeros_like(p) for p in (*theta.values(), *alpha.values())]
        optimizer = {i: {"step": torch.tensor(0.0), "exp_avg": z, "exp_avg_sq": z} for i, z in enumerate(zeros)}
    totals = {"env_steps": 0, "seconds": 0.0, "sample_seconds": 0.0, "smoothed": math.nan, "converged": False}
    state = {"format": checkpoints.FORMAT, "settings": settings, "epoch": 0, "totals": totals, "log": [], "eval": []}
    return state | {"theta": theta, "alpha": alpha, "optimizer": optimizer}


def of_each_run(step_sizes, p):
    """Step sizes (S,) in the shape that multiplies a parameter (S, 1, ...)."""
    return step_sizes.to(p).view(-1, *[1] * (p.dim() - 1))


class SGD:
    """The plain step p ← p − β p.grad with a β for each run: step_sizes, (S,) for each parameter (S, 1, ...)."""

    def __init__(self, params, step_sizes):
        self.params, self.step_sizes, self.state = params, step_sizes, {}

    @torch.no_grad()
    def step(self):
        for p, beta in zip(self.params, self.step_sizes, strict=True):
            p -= of_each_run(beta, p) * p.grad


class Adam:
    """torch's Adam with a β for each run: p ← p + β u, where u is its step of size 1."""

    def __init__(self, params, step_sizes):
        self.params, self.step_sizes, self.adam = params, step_sizes, torch.optim.Adam(params, lr=1.0)
        self.state = self.adam.state

    @torch.no_grad()
    def step(self):
        before = [p.clone() for p in self.params]
        for p in self.params:
            p.zero_()  # so that torch's step leaves u itself in p
        self.adam.step()
        for p, start, beta in zip(self.params, before, self.step_sizes, strict=True):
            p.mul_(of_each_run(beta, p)).add_(start)


OPTIMIZERS = {"sgd": SGD, "adam": Adam}


# --- what the user sees ---


def check_ranks(args, ranks):
    """All ranks must do the same, and have equally many tasks."""
    own = {key: value for key, value in vars(args).items() if key not in ("workers", "threads", "quiet")}
    for key, value in ranks.object_from_first(lambda: own).items():
        if own[key] != value:
            mine, first = (" ".join(map(str, x)) if isinstance(x, list) else x for x in (own[key], value))
            line = f"{ALL_SETTINGS[key].flag}: {mine} on rank {ranks.rank}, {first} on rank 0"
            raise RunError(f"{line}; start all with the same command", 2)
    tasks = args.tasks or default_of(ALL_SETTINGS["tasks"])
    if tasks % ranks.count:
        ranks.sum([torch.zeros(1)])  # all have come so far; or a slow one would lose its peer before it refuses this
        raise RunError(f"--tasks {tasks}: not a multiple of the {ranks.count} ranks; give a multiple", 2)


def begin(run, args, env, device, runs_in_batch):
    """Make the run's folder ready, with everything that somebody needs to repeat the run in config.json."""
    versions = {m.__name__: m.__version__ for m in (torch, gymnasium, numpy)} | {"python": platform.python_version()}
    here = {"epochs": args.epochs, "eval_every": args.eval_every, "threshold": args.threshold, "device": device}
    here |= {"phi_names": list(env.phi_names), "runs_in_batch": runs_in_batch, "versions": versions}
    checkpoints.begin(run, run.settings | here, {args.epochs, *range(0, args.epochs, args.eval_every)})


class Progress:
    """One bar for all runs of the command, counting every run's epochs; without a terminal, a line every 30 seconds."""

    def __init__(self, runs, args, ranks):
        self.show = not args.quiet and ranks.rank == 0
        done = sum(run.state["epoch"] for run in runs)
        self.bar = tqdm(total=args.epochs * len(runs), initial=done, unit="epoch", disable=None if self.show else True)
        self.lines, self.said, self.start = self.show and self.bar.disable, time.monotonic(), time.monotonic()
        self.done, self.begun, self.total = done, done, args.epochs * len(runs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def update(self, news):
        algo, count, mean_return = news
        self.done += count
        self.bar.set_description(algo, refresh=False)
        self.bar.set_postfix(return_post=f"{mean_return:.4g}", refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.lines and now - self.said > 30:
            left = (now - self.start) / (self.done - self.begun) * (self.total - self.done)
            print(f"{algo}: return {mean_return:.4g}; {self.done} of all runs' {self.total} epochs, {left:.0f} s left",
                  file=sys.stderr)  # fmt: skip
            self.said = now


def finish(failures, args):
    """Say which runs failed, and rewrite the report."""
    for line in sorted(failures):
        print(f"run.py: {line}", file=sys.stderr)
    root = folder_of_all(args)
    with checkpoints.locked(root, wait=True):  # another command may end just now
        wrote, left_out = report.write(root)
    for line in left_out:
        print(f"run.py: {line}", file=sys.stderr)
    for line in [] if args.quiet else wrote:
        print(line)


@contextlib.contextmanager
def one_clear_line():
    """Whatever is wrong, with the command or with the machine, ends in one line on standard error and an exit code; of
    several ranks, the one that failed first says it. Yields this process's `Ranks`."""
    ranks = None
    try:
        ranks = parallel.Ranks()
        yield ranks
        ranks.leave()
        return
    except RunError as error:
        line, code = error, error.code
    except parallel.ProcessError as error:
        line, code = f"{error}; continue from the last checkpoint with --resume", 1
    except OSError as error:  # a full disk, a folder that is gone or may not be written
        path = error.filename2 or error.filename or "files"  # a file that cannot be put in its place: the place
        line, code = f"{path}: {error.strerror or error}; fix this, then rerun with --resume", 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        line, code = "out of memory; give fewer --seed, --delta, --tasks, --trajectories or a smaller --hidden", 1
    except KeyboardInterrupt:  # outside of training, or the second one
        line, code = "stopped at once; continue from the last checkpoint with --resume", 128 + signal.SIGINT
    if ranks is None or ranks.first_to_fail():
        print("run.py:", " ".join(str(line).split("\n")), file=sys.stderr)
    if ranks is not None and ranks.count > 1:
        ranks.exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or a log file may have no δ
    main()
